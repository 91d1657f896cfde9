"""The offline class for scripts: prompts in, finished outputs out.

from serving import LLM, SamplingParams

with LLM("path/to/model", pipeline_parallel_size=2) as llm:
    for output in llm.generate(["Hello"], SamplingParams(max_tokens=24, temperature=0.0)):
        print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from serving.config.engine import EngineConfig
from serving.core import FinishReason, SamplingParams, TokenLogprobs
from serving.engine import Engine
from serving.errors import EngineDeadError, InvalidRequestError

if TYPE_CHECKING:
    from serving.tokenizer import Tokenizer

Prompt = str | Sequence[int]
T = TypeVar("T")


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `token_ids` include the token that ended it, `text` does not.

    `stop_reason` is the stop string or stop token id behind finish_reason "stop"; None means the
    model's own end token. `logprobs`, if asked for, has one entry for each token of the answer but
    not for the one that ended it.
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its `n` answers. `prompt` is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0


class LLM:
    """An engine of its own for a script; settings are those of `EngineConfig`.

    Without tokenizer files in the folder only lists of token ids are taken and `text` is empty.
    Use it as a context manager or call `close`. Raises ConfigError or ModelError at the start.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        on_progress: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> None:
        config = EngineConfig(model=Path(model), **settings)
        self._loop = asyncio.new_event_loop()
        # The engine's processes are tied to this thread, which ends in `close` only. A loop of
        # its own lets `generate` be called where another loop runs, as in a notebook.
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="llm")
        self._thread.start()
        self._closed = False
        try:
            self._engine = self._run(Engine.start(config, on_progress))
        except BaseException:
            self._end_loop()
            raise
        self._finalizer = weakref.finalize(self, _close, self._loop, self._thread, self._engine)
        try:
            self.tokenizer = _load_tokenizer(self._engine.model_config.folder)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The engine behind, for its `stats`, `num_pages` and `max_model_len`."""
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; results in the order of the prompts.

        `prompts`: one string, one list of token ids, or a list of either. One SamplingParams for
        all, or one a prompt. Raises InvalidRequestError if any prompt cannot be served, before any
        runs, and EngineDeadError if the engine ends meanwhile.
        """
        if self._closed:
            raise EngineDeadError("This LLM is closed; make a new one.")
        listed = _as_list(prompts)
        params = _as_params(sampling_params, len(listed))
        encoded = [self._encode(prompt) for prompt in listed]
        return self._run(self._generate(listed, encoded, params))

    def close(self) -> None:
        """End all processes of the engine; calling it again does nothing."""
        if not self._closed:
            self._closed = True
            self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- inside

    def _run(self, work: Awaitable[T]) -> T:
        async def as_coroutine() -> T:
            return await work

        future = asyncio.run_coroutine_threadsafe(as_coroutine(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise InvalidRequestError(
                "This model folder has no tokenizer files, so text cannot be read; give prompts "
                "as lists of token ids.",
                "prompt",
            )
        return self.tokenizer.encode(prompt)

    async def _generate(
        self, prompts: list[Prompt], encoded: list[list[int]], params: list[SamplingParams]
    ) -> list[RequestOutput]:
        for param in params:
            if param.stop and self.tokenizer is None:
                raise InvalidRequestError(
                    "This model folder has no tokenizer files, so stop strings cannot be found; "
                    "use stop_token_ids.",
                    "stop",
                )
        # Every prompt passes the door before any runs.
        streams = [
            [
                (choice, self._engine.generate(tokens, param, choice=choice))
                for choice in range(param.n)
            ]
            for tokens, param in zip(encoded, params, strict=True)
        ]
        tasks = [
            [asyncio.ensure_future(self._collect(c, s, param)) for c, s in choices]
            for choices, param in zip(streams, params, strict=True)
        ]
        flat = [task for row in tasks for task in row]
        try:
            await asyncio.gather(*flat)
        except BaseException:
            for task in flat:
                task.cancel()
            await asyncio.gather(*flat, return_exceptions=True)
            raise
        results = []
        for prompt, tokens, row in zip(prompts, encoded, tasks, strict=True):
            done = [task.result() for task in row]
            results.append(
                RequestOutput(
                    prompt=prompt if isinstance(prompt, str) else None,
                    prompt_token_ids=tokens,
                    outputs=[output for output, _ in done],
                    num_cached_tokens=done[0][1],
                )
            )
        return results

    async def _collect(
        self, choice: int, stream: Any, params: SamplingParams
    ) -> tuple[CompletionOutput, int]:
        """Run one sequence to its end; the answer and its cached prompt tokens."""
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = self.tokenizer.detokenizer(params.stop, min_tokens=params.min_tokens)
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        text = ""
        reason: FinishReason = "abort"
        stop_reason: int | str | None = None
        cached = 0
        try:
            async for output in stream:
                cached = output.cached_tokens
                tokens += output.token_ids
                if logprobs is not None:
                    logprobs += [_narrow(item, params) for item in output.logprobs or []]
                if detokenizer is not None:
                    text += detokenizer.feed(output.token_ids)
                    if detokenizer.stop_string is not None:
                        tokens = tokens[: detokenizer.num_tokens]
                        logprobs = logprobs[: len(tokens)] if logprobs is not None else None
                        reason, stop_reason = "stop", detokenizer.stop_string
                        break
                if output.finish_reason is not None:
                    reason = output.finish_reason
                    if output.stop_token_id is not None:
                        tokens.append(output.stop_token_id)
                        if output.stop_token_id in params.stop_token_ids:
                            stop_reason = output.stop_token_id
        finally:
            await stream.aclose()
        if detokenizer is not None:
            text += detokenizer.finish()
            if detokenizer.stop_string is not None and stop_reason is None:
                reason, stop_reason = "stop", detokenizer.stop_string
        return CompletionOutput(choice, tokens, text, reason, stop_reason, logprobs), cached


def _narrow(item: TokenLogprobs, params: SamplingParams) -> TokenLogprobs:
    """A neighbour in the micro-batch may have asked for more alternatives."""
    count = params.logprobs or 0
    return msgspec.structs.replace(
        item, top_ids=item.top_ids[:count], top_logprobs=item.top_logprobs[:count]
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"There are {count} prompts but {len(params)} sampling parameters; give one for all "
            "or one a prompt.",
            "sampling_params",
        )
    return list(params)


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    from serving.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder)


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, engine: Engine) -> None:
    if thread.is_alive():
        asyncio.run_coroutine_threadsafe(engine.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
    loop.close()
