"""GPUs of one host in one process: streams that run in any order that their waits allow.

Nothing runs when it is launched: `World.run` takes the head of a random stream again and again, so
a missing wait shows as wrong contents for some seed, and a circle of waits as a lock-up. With
`shared_queues` all streams of a device stand in one queue, in the order of their launches, which is
the worst that a driver may do to them.
"""

from __future__ import annotations

import random
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from serving.errors import EngineDeadError

MEMORY = 1 << 22


class World:
    """Memory of all devices, every stream's queue, and who has come how far."""

    def __init__(self, seed: int, *, shared_queues: bool = False) -> None:
        self.random = random.Random(seed)
        self.memory = bytearray(MEMORY)
        self.shared_queues = shared_queues
        self.queues: list[deque[tuple[int, Callable[[], bool]]]] = []
        self.events: list[tuple[int, int]] = []  # recorded, reached
        self.changed = threading.Condition()
        self._top = 4096

    def allocate(self, size: int) -> int:
        address = self._top
        self._top += -(-size // 512) * 512
        assert self._top <= MEMORY, "the simulated memory is too small"
        return address

    def word(self, address: int) -> int:
        value: int = struct.unpack_from("<I", self.memory, address)[0]
        return value

    def step(self) -> bool:
        """Run the head of one queue that can run; False if none can."""
        at = [queue for queue in self.queues if queue]
        self.random.shuffle(at)
        for queue in at:
            if queue[0][1]():
                queue.popleft()
                return True
        return False

    def run(self) -> None:
        """Until nothing is left. Raises if what is left waits for something that never comes."""
        while self.step():
            pass
        assert not any(self.queues), "the streams lock each other up"


class SimulatedGpu:
    """The StreamDriver of one device of a World."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._one: int | None = None

    def allocate(self, size: int) -> int:
        return self.world.allocate(size)

    def export(self, address: int) -> bytes:
        return address.to_bytes(64, "little")

    def open(self, handle: bytes) -> int:
        return int.from_bytes(handle, "little")

    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = 1
        for length in shape:
            count *= length
        view = memoryview(self.world.memory)[address : address + count * dtype.itemsize]
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def stream(self) -> int:
        with self.world.changed:
            if self.world.shared_queues and self._one is not None:
                return self._one
            self.world.queues.append(deque())
            self._one = len(self.world.queues) - 1
            return self._one

    def event(self) -> int:
        with self.world.changed:
            self.world.events.append((0, 0))
            return len(self.world.events) - 1

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        def run() -> bool:
            work()
            return True

        self._put(stream, run)

    def record(self, event: int, stream: int) -> None:
        with self.world.changed:
            times = self.world.events[event][0] + 1
            self.world.events[event] = (times, self.world.events[event][1])

        def reach() -> None:
            self.world.events[event] = (self.world.events[event][0], times)

        self.launch(stream, reach)

    def wait_event(self, stream: int, event: int) -> None:
        times = self.world.events[event][0]
        self._put(stream, lambda: self.world.events[event][1] >= times)

    def copy(self, stream: int, target: int, source: int, size: int) -> None:
        memory = self.world.memory

        def move() -> None:
            memory[target : target + size] = memory[source : source + size]

        self.launch(stream, move)

    def write(self, stream: int, address: int, value: int) -> None:
        assert 0 <= value < 1 << 32
        self.launch(stream, lambda: struct.pack_into("<I", self.world.memory, address, value))

    def wait(self, stream: int, address: int, value: int) -> None:
        assert 0 <= value < 1 << 32

        def reached() -> bool:
            return (self.world.word(address) - value) % (1 << 32) < 1 << 31

        self._put(stream, reached)

    def finished_within(self, streams: Sequence[int], seconds: float) -> bool:
        """Runs everybody's work, as real devices would meanwhile."""
        world = self.world
        with world.changed:
            while any(world.queues[stream] for stream in streams):
                if world.step():
                    world.changed.notify_all()
                elif not world.changed.wait(seconds):
                    return False
        return True

    def _put(self, stream: int, operation: Callable[[], bool]) -> None:
        with self.world.changed:
            self.world.queues[stream].append((stream, operation))
            self.world.changed.notify_all()


class Notes:
    """An Exchange inside one process."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._changed = threading.Condition()

    def publish(self, key: str, text: str) -> None:
        with self._changed:
            self._texts[key] = text
            self._changed.notify_all()

    def lookup(self, key: str) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._texts, 20):
                raise EngineDeadError(f"nobody published {key}")
            return self._texts[key]


class ImmediateGpu(SimulatedGpu):
    """Everything runs when it is launched; whatever is waited for must have happened by then."""

    def _put(self, stream: int, operation: Callable[[], bool]) -> None:
        assert operation(), "a stream would wait for something that was not launched before it"
