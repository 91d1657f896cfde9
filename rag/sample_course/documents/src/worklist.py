"""A worklist solver for gen/kill data-flow problems, forwards or backwards.

The solver is the same for reaching definitions, live variables and available
expressions; only direction, meeting operator and the gen and kill sets differ.
"""

from collections import deque
from collections.abc import Callable

Block = str
Facts = frozenset[str]


def solve(
    successors: dict[Block, list[Block]],
    gen: dict[Block, Facts],
    kill: dict[Block, Facts],
    *,
    forward: bool,
    meet: Callable[[list[Facts]], Facts],
    boundary: Facts,
    start: Facts,
) -> tuple[dict[Block, Facts], dict[Block, Facts]]:
    """Return the facts at the entry and at the exit of every block.

    `boundary` holds at the edge of the program (entry of the first block when forwards,
    exit of the last one when backwards), `start` is the first guess everywhere else:
    the empty set for "may" problems, the set of all facts for "must" problems.
    """
    predecessors: dict[Block, list[Block]] = {b: [] for b in successors}
    for block, targets in successors.items():
        for target in targets:
            predecessors[target].append(block)
    sources = predecessors if forward else successors
    targets_of = successors if forward else predecessors

    before = {b: start for b in successors}
    after = {b: start for b in successors}
    queue = deque(successors)
    while queue:
        block = queue.popleft()
        incoming = [after[s] for s in sources[block]]
        before[block] = meet(incoming) if incoming else boundary
        new = gen[block] | (before[block] - kill[block])
        if new != after[block]:
            after[block] = new
            queue.extend(t for t in targets_of[block] if t not in queue)
    return (before, after) if forward else (after, before)


def union(sets: list[Facts]) -> Facts:
    """Meeting operator of the "may" problems."""
    return frozenset().union(*sets)


if __name__ == "__main__":
    # i = 0; s = 0; while (i < n) { s = s + i; i = i + 1; } return s;
    graph = {"entry": ["test"], "test": ["body", "exit"], "body": ["test"], "exit": []}
    uses = {"entry": "", "test": "in", "body": "is", "exit": "s"}
    defines = {"entry": "is", "test": "", "body": "is", "exit": ""}
    live_in, live_out = solve(
        graph,
        {b: frozenset(v) for b, v in uses.items()},
        {b: frozenset(v) for b, v in defines.items()},
        forward=False,
        meet=union,
        boundary=frozenset(),
        start=frozenset(),
    )
    for name in graph:
        print(name, "in", sorted(live_in[name]), "out", sorted(live_out[name]))
