"""A driver in this process, with stages that are threads instead of child processes.

The sockets and messages are the real ones; the last stage runs the fake model.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import zmq

from serving.config.engine import EngineConfig, decode_path
from serving.core import Layout, Request, SamplingParams
from serving.driver.loop import Driver
from serving.messages import (
    AllocateKv,
    DriverSpec,
    Ended,
    FromStage,
    LayersCopied,
    MoveLayers,
    Ready,
    Shutdown,
    StageFailed,
    StageLoaded,
    StageProgress,
    StageSeconds,
    StageSpec,
    StageStarted,
    StageStats,
    StepOutputs,
    StepTime,
    Stop,
    ToClient,
    ToDriver,
    ToStage,
    socket_address,
)
from tests.serving.driver.fake import EOS, FakeModel

_CHECK_MS = 10


class StageThread:
    """Stands in for `serving.process.Child`.

    `behave` is asked with every message before it is handled. It returns None, or what to do
    instead: "die" (as if killed), "exit" (by itself, with code 3), "hang", or a message to send.
    """

    behave: Callable[[StageSpec, ToStage | None], str | FromStage | None]

    #: The last micro-batch of each stage, by directory: no stage does one before those in front.
    _done: ClassVar[dict[tuple[str, int], int]] = {}
    _news = threading.Condition()

    def __init__(self, module: str, settings: bytes, environment: Mapping[str, str]) -> None:
        assert module == "serving.stage"
        assert environment["OMP_NUM_THREADS"]
        self.spec = msgspec.json.decode(settings, type=StageSpec, dec_hook=decode_path)
        self._gone, self._alive = os.pipe()
        self._code: int | None = None
        self._kill = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # ---- what the group asks

    def fileno(self) -> int:
        return self._gone

    def has_ended(self) -> bool:
        return self._code is not None

    def wait(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return self.has_ended()

    def kill(self) -> None:
        self._kill.set()
        self._thread.join()

    def forget(self) -> None:
        os.close(self._gone)

    def how_it_ended(self) -> str:
        return f"ended with {self._code}"

    @property
    def was_killed(self) -> bool:
        return self._code == -9

    # ---- the thread

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        plans, results = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        plans.connect(socket_address(self.spec.directory, f"plans-{self.spec.worker}"))
        results.connect(socket_address(self.spec.directory, "results"))
        self._decoder: msgspec.msgpack.Decoder[ToStage] = msgspec.msgpack.Decoder(ToStage)
        code: int | None = None
        try:
            code = self._serve(plans, results)
        finally:
            plans.close(linger=0)
            results.close(linger=500)
            context.term()
            self._code = code  # a process has ended only when its last words have left
            os.close(self._alive)

    def _serve(self, plans: zmq.Socket[bytes], results: zmq.Socket[bytes]) -> int:
        def send(message: FromStage) -> None:
            results.send(msgspec.msgpack.encode(message))

        spec = self.spec
        stage, rank = spec.stage, spec.rank
        message: ToStage | None = None
        layout = coming = spec.layout
        gains: set[int] = set()
        last = stage == spec.layout.num_stages - 1
        while True:
            verdict = type(self).behave(spec, message)
            if verdict == "die":
                return -9
            if verdict == "exit":
                return 3
            if verdict == "hang":
                self._kill.wait()
                return -9
            if verdict is not None and not isinstance(verdict, str):
                send(verdict)
                if isinstance(verdict, StageFailed):
                    return 1
            elif message is None:
                send(StageProgress(stage, f"stage {stage} reads"))
                send(StageLoaded(stage, 50 + stage, rank, "thread", "fake"))
            elif isinstance(message, AllocateKv):
                model = FakeModel(spec.config, message.num_pages, message.max_model_len)
                send(StageStarted(stage, rank))
            elif isinstance(message, Shutdown):
                return 0
            elif isinstance(message, MoveLayers):
                coming = message.layout
                if gains := set(coming.layers(stage)) - set(layout.layers(stage)):
                    send(LayersCopied(stage, rank, coming.epoch, False))
            else:
                if message.epoch != layout.epoch:
                    assert message.epoch == coming.epoch
                    layout = coming
                    if gains:
                        send(LayersCopied(stage, rank, layout.epoch, True))
                self._wait_for_stages_in_front(message.number)
                if last and rank == 0:
                    send(model.run(message))
                if rank == 0:
                    with self._news:
                        self._done[spec.directory, stage] = message.number
                        self._news.notify_all()
                    began = float(message.number)
                    steps = [StepTime(message.number, 0.001, began, began + 0.001)]
                    send(StageStats(stage, StageSeconds(busy=0.001 * message.number), steps))
            while not plans.poll(_CHECK_MS):
                if self._kill.is_set():
                    return -9
            message = self._decoder.decode(plans.recv())

    def _wait_for_stages_in_front(self, number: int) -> None:
        spec = self.spec
        with self._news:
            while not self._kill.is_set() and any(
                self._done.get((spec.directory, stage), -1) < number for stage in range(spec.stage)
            ):
                self._news.wait(_CHECK_MS / 1000)


class Client:
    """The process with the Engine, as far as the driver sees it. Use as a context manager."""

    def __init__(self, directory: Path, **settings: object) -> None:
        defaults: dict[str, object] = {
            "page_size": 4,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "num_kv_pages": 40,
            "threads": 1,
            "profile_seconds": 0.0,
        }
        config = EngineConfig(model=Path("fake"), **(defaults | settings))  # type: ignore[arg-type]
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._incoming = self._context.socket(zmq.PULL)
        self._incoming.bind(socket_address(str(directory), "client"))
        self._outgoing = self._context.socket(zmq.PUSH)
        self._outgoing.bind(socket_address(str(directory), "driver"))
        spec = DriverSpec(
            config=config,
            directory=str(directory),
            parent_pid=os.getpid(),
            layout=Layout.even(4, config.pipeline_parallel_size),
            vocab_size=50,
            eos_token_ids=[EOS],
            context_length=100,
        )
        self._decoder: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)
        self.driver = Driver(spec)
        self.seen: list[ToClient] = []
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, Ended] = {}
        self.failures: queue.Queue[BaseException | None] = queue.Queue()
        self._thread = threading.Thread(target=self._drive, daemon=True)

    def _drive(self) -> None:
        failure: BaseException | None = None
        try:
            self.driver.run()
        except BaseException as error:
            failure = error
        self.driver.close(orderly=failure is None)
        self.failures.put(failure)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None and self._thread.is_alive():
            self.send(Stop())
        self._thread.join(20)
        self._incoming.close(linger=0)
        self._outgoing.close(linger=0)
        self._context.term()
        assert not self._thread.is_alive(), "the driver did not end"

    def send(self, message: ToDriver) -> None:
        self._outgoing.send(msgspec.msgpack.encode(message))

    def request(self, stream: int, prompt: list[int], tokens: int) -> Request:
        return Request(
            stream=stream,
            prompt=np.array(prompt, dtype="<i4").tobytes(),
            params=SamplingParams(max_tokens=tokens, ignore_eos=True),
            max_tokens=tokens,
        )

    def until(self, wanted: Callable[[ToClient], bool], seconds: float = 20) -> ToClient:
        """Take messages until one is wanted."""
        deadline = time.monotonic() + seconds
        while self._incoming.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            message = self._decoder.decode(self._incoming.recv())
            self.seen.append(message)
            if isinstance(message, StepOutputs):
                streams = np.frombuffer(message.streams, "<i8").tolist()
                tokens = np.frombuffer(message.tokens, "<i4").tolist()
                for stream, token in zip(streams, tokens, strict=True):
                    self.tokens.setdefault(stream, []).append(token)
                self.ended |= {ended.stream: ended for ended in message.ended}
            if wanted(message):
                return message
        how = "" if self.failures.empty() else f"; the driver ended: {self.failures.get()!r}"
        seen = [type(one).__name__ for one in self.seen]
        raise AssertionError(f"not told; seen: {seen}{how}")

    def ready(self) -> Ready:
        message = self.until(lambda one: isinstance(one, Ready))
        assert isinstance(message, Ready)
        return message

    def failure(self) -> BaseException | None:
        """How `run` ended: None, or what it raised."""
        return self.failures.get(timeout=20)
