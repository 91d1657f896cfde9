"""Linear scan over live intervals: the register allocator of the fourth lab in small.

Run it with `python3 linear_scan.py`; it allocates the intervals at the bottom of the
file to two registers and prints where each variable lives.
"""

from dataclasses import dataclass


@dataclass
class Interval:
    """A variable is live from `start` to `end`, both instruction numbers, inclusive."""

    name: str
    start: int
    end: int


def allocate(intervals: list[Interval], registers: list[str]) -> dict[str, str]:
    """Give every interval a register or a stack slot, in one pass by start point.

    `active` holds the intervals that occupy a register now, sorted by end point. When no
    register is free the interval that ends last is sent to memory: it would block a
    register for the longest time.
    """
    place: dict[str, str] = {}
    free = list(reversed(registers))
    active: list[Interval] = []
    slots = 0

    def new_slot() -> str:
        nonlocal slots
        slots += 1
        return f"stack[{slots - 1}]"

    for current in sorted(intervals, key=lambda i: i.start):
        expire(active, free, place, current.start)
        if free:
            place[current.name] = free.pop()
            active.append(current)
        else:
            last = active[-1]
            if last.end > current.end:
                place[current.name] = place[last.name]
                place[last.name] = new_slot()
                active.remove(last)
                active.append(current)
            else:
                place[current.name] = new_slot()
        active.sort(key=lambda i: i.end)
    return place


def expire(
    active: list[Interval], free: list[str], place: dict[str, str], now: int
) -> None:
    """Hand back the registers of intervals that ended before `now`."""
    while active and active[0].end < now:
        free.append(place[active.pop(0).name])


if __name__ == "__main__":
    program = [
        Interval("a", 1, 10),
        Interval("b", 2, 4),
        Interval("c", 3, 6),
        Interval("d", 5, 9),
        Interval("e", 7, 8),
    ]
    for name, where in sorted(allocate(program, ["t0", "t1"]).items()):
        print(name, where)
