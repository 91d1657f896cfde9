"""The engine as an asyncio program sees it: start, generate, restart, close."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import zmq
import zmq.asyncio

from serving.config.engine import EngineConfig, encode_path
from serving.config.model import ModelConfig
from serving.config.service import Service
from serving.config.shares import rank_config
from serving.core import FinishReason, Layout, Request, SamplingParams, TokenLogprobs, TokenOutput
from serving.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    LecternError,
    ModelError,
    OverloadedError,
)
from serving.messages import (
    Abort,
    DriverSpec,
    EngineStats,
    Failed,
    LayersMoved,
    Progress,
    Ready,
    Rebalance,
    Recovering,
    Refused,
    StageSteps,
    StepOutputs,
    StepPlanned,
    Stop,
    Submit,
    ToClient,
    ToDriver,
    socket_address,
)
from serving.process import Child, make_group_directory, remove_group_directory

_CLOSE_SECONDS = 4.0
_MASK = (1 << 64) - 1


class _Stream:
    """What arrived for one sequence and was not taken yet."""

    __slots__ = (
        "admitted",
        "cached",
        "ended",
        "logprobs",
        "news",
        "refused",
        "stop_token",
        "tokens",
    )

    def __init__(self, wants_logprobs: bool) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = [] if wants_logprobs else None
        self.ended: FinishReason | None = None
        self.stop_token: int | None = None
        self.cached = 0
        self.admitted = False
        self.refused: Refused | None = None
        self.news = asyncio.Event()

    def take(self) -> TokenOutput:
        self.news.clear()
        tokens, self.tokens = self.tokens, []
        logprobs = self.logprobs
        if logprobs is not None:
            self.logprobs = []
        return TokenOutput(
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=self.ended,
            stop_token_id=self.stop_token,
            cached_tokens=self.cached,
        )


class Engine:
    """One engine: a driver process and its stages, started and ended together.

    All methods belong to the event loop on which `start` ran. `max_model_len` and `num_pages` are
    known once it is ready. When stages end by themselves, `state` is "recovering" and `reason` a
    sentence until others have taken their place; `generate` only waits meanwhile. When the driver
    ends, or cannot help itself any more, `state` becomes "dead", and every open `generate` raises
    EngineDeadError.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Use `start`. Raises ModelError or ConfigError for what can be seen without loading."""
        self.config = config
        self.model_config = ModelConfig.from_folder(config.model)
        self.state: Literal["starting", "ready", "recovering", "dead"] = "starting"
        self.reason = ""
        self.stats = EngineStats()
        self.max_model_len = 0
        self.num_pages = 0
        #: Called with every new picture of the engine.
        self.on_stats: Callable[[EngineStats], None] | None = None
        #: Called when layers have moved between stages.
        self.on_move: Callable[[LayersMoved], None] | None = None
        #: Called with what `EngineConfig.record_steps` makes the driver tell.
        self.on_steps: Callable[[StepPlanned | StageSteps], None] | None = None
        #: Called when stages died and are replaced, and with None when that is done.
        self.on_recovery: Callable[[Recovering | None], None] | None = None
        self._layout = _layout(config, self.model_config)
        rank_config(self.model_config, config.tensor_parallel_size)
        self._on_progress: Callable[[str], None] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToClient] = msgspec.msgpack.Decoder(ToClient)
        self._streams: dict[int, _Stream] = {}
        self._last_stream = 0
        self._dead = asyncio.Event()
        self._context: zmq.asyncio.Context | None = None
        self._driver: Child | None = None
        self._directory: Path | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, on_progress: Callable[[str], None] | None = None
    ) -> Engine:
        """Start driver and stages and wait until a token can be produced.

        Raises ConfigError, ModelError or EngineDeadError, with nothing left running.
        """
        engine = cls(config)
        engine._on_progress = on_progress
        await engine._start_group()
        return engine

    @property
    def layout(self) -> Layout:
        """Which stage owns which layers."""
        return self._layout

    # ---- requests

    def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        choice: int = 0,
        cache_salt: str = "",
        service: Service | None = None,
    ) -> AsyncIterator[TokenOutput]:
        """Outputs of one sequence. Leaving the iterator early ends the work on it.

        The first output is empty and `queued`; the next one is empty too and says that the sequence
        was scheduled; tokens follow, several in one output when the caller is slower than the
        engine. The last one has a `finish_reason`. `choice` tells sequences of one request apart.
        `service` says whose it is and how soon it is wanted; by default it is best effort.

        Raises InvalidRequestError or ContextLengthError at once, OverloadedError before it is
        scheduled, EngineDeadError at any time.
        """
        self._raise_if_dead()
        request = self._check(prompt_token_ids, params, choice, cache_salt)
        if service is not None:
            request = msgspec.structs.replace(request, service=service)
        return self._outputs(request)

    def _check(
        self, prompt: list[int], params: SamplingParams, choice: int, cache_salt: str
    ) -> Request:
        """The door: whatever passes can be finished."""
        vocab = self.model_config.vocab_size
        params.validate(vocab)
        length = len(prompt)
        if not length:
            raise InvalidRequestError("The prompt is empty; give at least one token.", "prompt")
        ids = np.asarray(prompt)
        if ids.dtype.kind not in "iu" or int(ids.min()) < 0 or int(ids.max()) >= vocab:
            raise InvalidRequestError(
                f"The prompt holds token ids outside 0 to {vocab - 1}, which this model does "
                "not have.",
                "prompt",
            )
        room = self.max_model_len - length
        if room < 1:
            raise ContextLengthError(
                f"The prompt has {length} tokens, but the context holds {self.max_model_len} "
                "including the answer; shorten the prompt.",
                "prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise ContextLengthError(
                f"The prompt has {length} tokens and max_tokens is {params.max_tokens}, together "
                f"more than the context of {self.max_model_len}; shorten the prompt or lower "
                "max_tokens.",
                "max_tokens",
            )
        seed = secrets.randbits(64) if params.seed is None else params.seed & _MASK
        self._last_stream += 1
        return Request(
            stream=self._last_stream,
            prompt=ids.astype("<i4").tobytes(),
            # Stop strings are found where text is made, not in the driver.
            params=msgspec.structs.replace(params, seed=seed, stop=[]),
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            choice=choice,
            cache_salt=cache_salt,
        )

    async def _outputs(self, request: Request) -> AsyncIterator[TokenOutput]:
        self._raise_if_dead()
        stream = _Stream(request.params.logprobs is not None)
        self._streams[request.stream] = stream
        self._send(Submit(request))
        try:
            yield TokenOutput(token_ids=[], queued=True)
            while stream.ended is None:
                await stream.news.wait()
                if self.state == "dead" and stream.ended is None:
                    raise EngineDeadError(self.reason)
                if stream.refused is not None:
                    raise _overloaded(stream.refused)
                yield stream.take()
        finally:
            self._streams.pop(request.stream, None)
            if stream.ended is None and stream.refused is None and self.state != "dead":
                self._send(Abort(request.stream))

    def _raise_if_dead(self) -> None:
        if self.state == "dead":
            raise EngineDeadError(self.reason)
        if self.state == "starting":
            raise EngineDeadError("The engine is still starting; try again in a moment.")

    def move_layers(self, counts: list[int]) -> None:
        """Let stage i have counts[i] layers as soon as may be; `stats.layers` says what is.

        Raises ConfigError where the stages cannot hold that, EngineDeadError.
        """
        self._raise_if_dead()
        windows = self._layout.windows(self.config.movable)
        bounds = Layout.of_counts(counts).bounds
        fits = len(bounds) == len(windows) and min(counts) > 0
        if not fits or any(b not in window for b, window in zip(bounds, windows, strict=True)):
            raise ConfigError(
                f"Layers cannot move from {self._layout.counts} to {counts}: with "
                f"--layer-rebalance {self.config.layer_rebalance} each bound between two stages "
                f"may move by at most {self.config.movable}.",
                "--movable-layers",
            )
        self._send(Rebalance(counts))

    # ---- life and death

    async def wait_dead(self) -> str:
        """Wait until the engine is dead; why, as a sentence."""
        await self._dead.wait()
        return self.reason

    async def restart(self) -> None:
        """End what is left of the group and start a new one; open requests raise an error."""
        await self._end_group("The engine is being restarted.", orderly=self.state == "ready")
        await self._start_group()

    async def close(self) -> None:
        """End every process of the engine within a few seconds, even one that hangs."""
        await self._end_group("The engine was closed.", orderly=self.state == "ready")

    async def _start_group(self) -> None:
        self.state, self.reason = "starting", ""
        self._dead = asyncio.Event()
        self._directory = make_group_directory()
        directory = str(self._directory)
        self._context = zmq.asyncio.Context()
        self._incoming = self._context.socket(zmq.PULL)
        self._incoming.set_hwm(1 << 16)
        self._incoming.bind(socket_address(directory, "client"))
        # Sends never wait: the queue is far longer than what may be open at once.
        self._outgoing = zmq.Context(self._context).socket(zmq.PUSH)
        self._outgoing.set_hwm(1 << 16)
        self._outgoing.bind(socket_address(directory, "driver"))
        spec = DriverSpec(
            config=self.config,
            directory=directory,
            parent_pid=os.getpid(),
            layout=self._layout,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=list(self.model_config.eos_token_ids),
            context_length=self.model_config.context_length,
        )
        self._driver = Child("serving.driver", msgspec.json.encode(spec, enc_hook=encode_path))
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._driver.fileno(), self._driver_ended)
        self._receiver = asyncio.create_task(self._receive())
        try:
            await self._started
        except BaseException:
            await self._end_group("The engine did not start.", orderly=False)
            raise

    async def _end_group(self, reason: str, *, orderly: bool) -> None:
        driver, self._driver = self._driver, None
        if driver is None:
            return
        asyncio.get_running_loop().remove_reader(driver.fileno())
        self._receiver.cancel()
        if orderly and not driver.has_ended():
            self._send(Stop())
        self._die(reason)
        await asyncio.to_thread(_collect, driver, _CLOSE_SECONDS if orderly else 0.0)
        self._incoming.close(linger=0)
        self._outgoing.close(linger=0)
        if self._context is not None:
            self._context.term()
        if self._directory is not None:
            remove_group_directory(self._directory)

    def _driver_ended(self) -> None:
        """The driver is gone. If it could say why, that is still in the queue."""
        driver = self._driver
        if driver is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(driver.fileno())
        driver.wait(1.0)

        def say() -> None:
            if self._driver is driver:  # and not that of a group started since
                self._die(f"The driver process {driver.how_it_ended()}.")

        loop.call_later(0.2, say)

    def _die(self, reason: str, error: LecternError | None = None) -> None:
        if not self._started.done():
            self._started.set_exception(error or EngineDeadError(reason))
        if self.state == "dead":
            return
        self.state, self.reason = "dead", reason
        self._dead.set()
        for stream in self._streams.values():
            stream.news.set()

    # ---- messages

    def _send(self, message: ToDriver) -> None:
        try:
            self._outgoing.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._die("The driver takes no more requests.")

    async def _receive(self) -> None:
        while True:
            data: bytes = await self._incoming.recv()
            message = self._decoder.decode(data)
            if isinstance(message, StepOutputs):
                self._deliver(message)
            elif isinstance(message, EngineStats):
                self.stats = message
                if self.on_stats is not None:
                    self.on_stats(message)
            elif isinstance(message, LayersMoved):
                if self.on_move is not None:
                    self.on_move(message)
            elif isinstance(message, StepPlanned | StageSteps):
                if self.on_steps is not None:
                    self.on_steps(message)
            elif isinstance(message, Progress):
                if self._on_progress is not None:
                    self._on_progress(message.text)
            elif isinstance(message, Ready):
                self._become_ready(message)
            elif isinstance(message, Recovering):
                self._recovery("recovering", message)
            elif isinstance(message, Failed):
                self._die(message.reason, _start_error(message))

    def _become_ready(self, message: Ready) -> None:
        self.num_pages, self.max_model_len = message.num_pages, message.max_model_len
        if not self._started.done():
            self.state = "ready"
            self._started.set_result(None)
        else:
            self._recovery("ready", None)

    def _recovery(self, state: Literal["ready", "recovering"], message: Recovering | None) -> None:
        if self.state == "dead":
            return
        self.state, self.reason = state, message.reason if message is not None else ""
        if self.on_recovery is not None:
            self.on_recovery(message)

    def _deliver(self, message: StepOutputs) -> None:
        streams = self._streams
        for admitted in message.admitted:
            if (stream := streams.get(admitted.stream)) is not None:
                stream.cached = admitted.cached_tokens
                stream.admitted = True
                stream.news.set()
        for refused in message.refused:
            if (stream := streams.get(refused.stream)) is not None:
                stream.refused = refused
                stream.news.set()
        numbers = np.frombuffer(message.streams, dtype="<i8").tolist()
        tokens = np.frombuffer(message.tokens, dtype="<i4").tolist()
        for number, token in zip(numbers, tokens, strict=True):
            if (stream := streams.get(number)) is not None:
                stream.tokens.append(token)
                stream.news.set()
        if message.logprob_rows:
            self._deliver_logprobs(message, numbers, tokens)
        for ended in message.ended:
            if (stream := streams.get(ended.stream)) is not None:
                stream.ended = ended.reason
                stream.stop_token = ended.stop_token_id
                stream.news.set()

    def _deliver_logprobs(
        self, message: StepOutputs, numbers: list[int], tokens: list[int]
    ) -> None:
        rows = np.frombuffer(message.logprob_rows, dtype="<i4").tolist()
        chosen = np.frombuffer(message.logprobs, dtype="<f4").tolist()
        shape = (len(rows), message.top_k)
        top_ids = np.frombuffer(message.top_ids, dtype="<i4").reshape(shape).tolist()
        top = np.frombuffer(message.top_logprobs, dtype="<f4").reshape(shape).tolist()
        for index, row in enumerate(rows):
            stream = self._streams.get(numbers[row])
            if stream is not None and stream.logprobs is not None:
                stream.logprobs.append(
                    TokenLogprobs(tokens[row], chosen[index], top_ids[index], top[index])
                )


def _collect(driver: Child, seconds: float) -> None:
    """Wait for the driver's orderly end; kill it, and with it its stages, when that takes long."""
    if seconds:
        driver.wait(seconds)
    driver.kill()
    driver.forget()


def _overloaded(refused: Refused) -> OverloadedError:
    return OverloadedError(
        f"Too many requests are waiting: the first token would come after {refused.ttft:.0f} s; "
        f"send the request again in {refused.retry_after:.0f} s.",
        refused.retry_after,
    )


def _start_error(message: Failed) -> LecternError:
    if message.kind == "config":
        return ConfigError(message.reason, message.flag)
    if message.kind == "model":
        return ModelError(message.reason)
    return EngineDeadError(message.reason)


def _layout(config: EngineConfig, model: ModelConfig) -> Layout:
    stages = config.pipeline_parallel_size
    if stages > model.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size is {stages}, but the model has only {model.num_layers} "
            "layers; use at most one stage a layer.",
            "--pipeline-parallel-size",
        )
    if config.layer_layout is None:
        return Layout.even(model.num_layers, stages)
    if sum(config.layer_layout) != model.num_layers:
        raise ConfigError(
            f"--layer-layout adds up to {sum(config.layer_layout)} layers, but the model has "
            f"{model.num_layers}.",
            "--layer-layout",
        )
    return Layout.of_counts(config.layer_layout)
