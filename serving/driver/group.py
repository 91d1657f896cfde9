"""The stage group as the driver sees it: its processes, its sockets, its start and its end.

A worker is one rank of one stage; workers are numbered stage by stage, in each rank by rank. All
ranks of a stage get the same plans. Results come from rank 0 of the last stage alone.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from serving.config.engine import encode_path
from serving.core import Admission, Layout, StepPlan
from serving.errors import ConfigError, EngineDeadError, LecternError, ModelError
from serving.messages import (
    AllocateKv,
    DriverSpec,
    FromStage,
    Shutdown,
    StageFailed,
    StageLoaded,
    StageProgress,
    StageSpec,
    StageStarted,
    ToStage,
    socket_address,
)
from serving.process import Child, available_cores, remove_group_directory

_QUEUE = 1024  # many times what can be in flight
_SEND_MS = 10_000
_SETTLE_SECONDS = 0.3
_SHUTDOWN_SECONDS = 2.0


class StageGroup:
    """One PUSH socket a worker for plans, one PULL socket for what comes back.

    A death or an error of one worker ends the group: `failure` makes it a sentence. Its sockets and
    meeting places are in a directory of its own, where another group finds nothing of it.
    """

    def __init__(
        self,
        spec: DriverSpec,
        layout: Layout,
        context: zmq.Context[zmq.Socket[bytes]],
        pid: int,
    ) -> None:
        self.layout = layout
        self._directory = tempfile.mkdtemp(prefix="group-", dir=spec.directory)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromStage] = msgspec.msgpack.Decoder(FromStage)
        self.results = context.socket(zmq.PULL)
        self.results.set_hwm(_QUEUE)
        self.results.bind(socket_address(self._directory, "results"))
        #: Name of what each stage runs on, and of its numbers; known once all have loaded.
        self.devices = [""] * layout.num_stages
        self.dtype = ""
        self._plans = []
        self.children: list[Child] = []
        self._stages, self._ranks = layout.num_stages, spec.config.tensor_parallel_size
        workers = self._stages * self._ranks
        threads = spec.config.threads or max(1, available_cores() // workers)
        for worker in range(workers):
            socket = context.socket(zmq.PUSH)
            socket.set_hwm(_QUEUE)
            socket.bind(socket_address(self._directory, f"plans-{worker}"))
            self._plans.append(socket)
        for worker in range(workers):
            settings = StageSpec(
                config=spec.config,
                directory=self._directory,
                parent_pid=pid,
                layout=layout,
                home=spec.layout,
                stage=worker // self._ranks,
                rank=worker % self._ranks,
                threads=threads,
            )
            environment = {"OMP_NUM_THREADS": str(threads)}
            if "GOMP_SPINCOUNT" not in os.environ:
                # By default idle compute threads spin for so long that on a busy machine they
                # keep the thread they wait for off its core.
                environment["GOMP_SPINCOUNT"] = "10000"
            if spec.config.movable and "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ:
                # A queue of the device for every stream: KV on the move must not stand behind
                # computation that waits for it.
                environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
            encoded = msgspec.json.encode(settings, enc_hook=encode_path)
            self.children.append(Child("serving.stage", encoded, environment))

    # ---- start

    def wait_loaded(self, on_progress: Callable[[str], None]) -> int:
        """Wait until all workers hold their weights; the number of KV pages that all can hold.

        Raises what a stage failed with.
        """
        pages: dict[tuple[int, int], int] = {}
        while len(pages) < len(self.children):
            for message in self.wait():
                if isinstance(message, StageLoaded):
                    pages[message.stage, message.rank] = message.max_pages
                    self.devices[message.stage] = message.device
                    self.dtype = message.dtype
                elif isinstance(message, StageProgress):
                    on_progress(message.text)
        return min(pages.values())

    def wait_started(self, num_pages: int, max_model_len: int) -> None:
        """Let all workers make their pages and use every link once."""
        self.send_all(AllocateKv(num_pages, max_model_len))
        started: set[tuple[int, int]] = set()
        while len(started) < len(self.children):
            started.update((m.stage, m.rank) for m in self.wait() if isinstance(m, StageStarted))

    def wait(self, seconds: float | None = None) -> list[FromStage]:
        """What comes back next, within so many seconds. Raises why the group ended if it did."""
        poller = zmq.Poller()
        poller.register(self.results, zmq.POLLIN)
        for child in self.children:
            poller.register(child, zmq.POLLIN)
        poller.poll(None if seconds is None else int(seconds * 1000))
        messages = self.receive()
        for message in messages:
            if isinstance(message, StageFailed):
                raise self.failure(message)
        if any(child.has_ended() for child in self.children):
            raise self.failure(None)
        return messages

    # ---- steps

    def send_plan(self, plan: StepPlan) -> None:
        """Send a plan to every worker; each admission carries only what the stage needs."""
        last = self._stages - 1
        encoded = self._encoder.encode(plan) if not plan.admitted else b""
        for stage in range(self._stages):
            if plan.admitted:
                admitted = [_for_stage(a, stage == 0, stage == last) for a in plan.admitted]
                encoded = self._encoder.encode(msgspec.structs.replace(plan, admitted=admitted))
            for rank in range(self._ranks):
                self._send_bytes(stage * self._ranks + rank, encoded)

    def send_all(self, message: ToStage) -> None:
        """Send a message to every worker, in its place among the plans."""
        for worker in range(len(self.children)):
            self._send(worker, message)

    def receive(self) -> list[FromStage]:
        """Everything that has come back; never waits."""
        messages = []
        try:
            while True:
                messages.append(self._decoder.decode(self.results.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return messages

    # ---- end

    def failure(self, told: StageFailed | None) -> LecternError:
        """Why the group ended. A worker that was killed is the cause; its neighbours' broken links
        are not, so a moment is given for all deaths to show."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        for child in self.children:
            child.wait(max(0.0, deadline - time.monotonic()))
        reports = [told] if told is not None else []
        if reports or any(child.was_killed for child in self.children):
            deadline = 0.0
        reports += self._last_words(deadline)
        for report in reports:
            if report.kind == "config":
                return ConfigError(report.message, report.flag)
            if report.kind == "model":
                return ModelError(report.message)
        for worker, child in enumerate(self.children):
            if child.was_killed:
                return EngineDeadError(f"{self._name(worker)} {child.how_it_ended()}.")
        for report in reports:
            worker = report.stage * self._ranks + report.rank
            what = report.message.rstrip(".")
            return EngineDeadError(f"{self._name(worker)} failed: {what}.")
        for worker, child in enumerate(self.children):
            if child.has_ended():
                return EngineDeadError(f"{self._name(worker)} {child.how_it_ended()}.")
        return EngineDeadError("A stage failed without saying why.")

    def _last_words(self, deadline: float) -> list[StageFailed]:
        """Why workers end, as they say. What one has sent before it ended may still be on its way,
        so it is waited for until the deadline."""
        while True:
            found = [message for message in self.receive() if isinstance(message, StageFailed)]
            left = int(1000 * (deadline - time.monotonic()))
            if found or left <= 0 or not self.results.poll(left):
                return found

    def close(self, *, orderly: bool) -> None:
        """End all stages: asked first if `orderly`, killed if they do not follow."""
        if orderly:
            for plans in self._plans:
                try:
                    plans.send(self._encoder.encode(Shutdown()), zmq.NOBLOCK)
                except zmq.ZMQError:
                    continue  # it is gone or stuck; it is killed below
            deadline = time.monotonic() + _SHUTDOWN_SECONDS
            for child in self.children:
                child.wait(max(0.0, deadline - time.monotonic()))
        for child in self.children:
            child.kill()
            child.forget()
        for socket in (*self._plans, self.results):
            socket.close(linger=0)
        remove_group_directory(Path(self._directory))

    def _send(self, worker: int, message: ToStage) -> None:
        self._send_bytes(worker, self._encoder.encode(message))

    def _send_bytes(self, worker: int, data: bytes) -> None:
        """Send, and wait a while if that cannot be done now: nobody may be there to take it."""
        socket = self._plans[worker]
        deadline = time.monotonic() + _SEND_MS / 1000
        while True:
            try:
                socket.send(data, zmq.NOBLOCK)
                return
            except zmq.Again:
                if self._wait_for_room(socket, deadline - time.monotonic()):
                    continue
            raise EngineDeadError(f"{self._name(worker)} takes no more plans.")

    def _wait_for_room(self, socket: zmq.Socket[bytes], seconds: float) -> bool:
        """Whether a message may be sent within so long. Raises why the group ended if it did."""
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLOUT)
        for child in self.children:
            poller.register(child, zmq.POLLIN)
        events = dict(poller.poll(max(0, int(seconds * 1000))))
        if any(child.fileno() in events for child in self.children):
            raise self.failure(None)
        return bool(events)

    def _name(self, worker: int) -> str:
        stage, rank = divmod(worker, self._ranks)
        return f"Stage {stage}" if self._ranks == 1 else f"Rank {rank} of stage {stage}"


def _for_stage(admission: Admission, first: bool, last: bool) -> Admission:
    return msgspec.structs.replace(
        admission,
        tokens=admission.tokens if first or last else b"",
        params=admission.params if last else None,
    )
