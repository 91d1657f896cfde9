"""/v1/completions: its fields and its frames."""

from __future__ import annotations

from typing import Any

from serving.api.body import Body, check_integers, wrong_type
from serving.api.choice import Delta, ShownToken
from serving.api.dialect import Dialect, check_model
from serving.api.fields import COMPLETION, check_fields
from serving.api.generation import Plan
from serving.api.logprobs import completion_logprobs
from serving.api.sampling import (
    check_room,
    check_text_size,
    check_token_ids,
    read_salt,
    read_sampling,
)
from serving.api.service import EngineLike, ServedModel
from serving.api.threads import in_thread_if_long
from serving.core import MAX_LOGPROBS
from serving.errors import InvalidRequestError

#: Answers that one request may ask for: prompts times n.
MAX_ANSWERS = 256


class Completion(Dialect):
    """A completion request: one or several prompts, each as text or token ids."""

    chunk_object = "text_completion"
    answer_object = "text_completion"
    id_prefix = "cmpl"

    _top: int | None = None
    _echoed: list[str] | None = None

    @classmethod
    async def parse(
        cls, body: Body, model: ServedModel, engine: EngineLike, request_id: str
    ) -> Completion:
        """Check every field and tokenise the prompts. Raises InvalidRequestError or ApiError."""
        check_model(body, model)
        request = cls(body, model, request_id)
        request.ignored = check_fields(body, COMPLETION)
        request._top = body.integer("logprobs")
        if request._top is not None and not 0 <= request._top <= MAX_LOGPROBS:
            raise InvalidRequestError(
                f"logprobs must be between 0 and {MAX_LOGPROBS}, not {request._top}.", "logprobs"
            )
        echo = body.flag("echo")
        if echo and request._top is not None:
            raise InvalidRequestError(
                "echo together with logprobs is not supported: there are no log probabilities "
                "of the prompt.",
                "echo",
                code="unsupported_parameter",
            )
        params = read_sampling(
            body, model, max_tokens=body.integer("max_tokens"), logprobs=request._top
        )
        _check_best_of(body, params.n)
        salt = read_salt(body)
        texts = _split_prompts(body.raw("prompt"))
        if len(texts) * params.n > MAX_ANSWERS:
            raise InvalidRequestError(
                f"{len(texts)} prompts times n = {params.n} are more than {MAX_ANSWERS} answers; "
                "send fewer at a time.",
                "prompt",
            )
        special = body.flag("add_special_tokens", True)
        prompts = [
            await prompt_ids(text, model, engine, add_special_tokens=special) for text in texts
        ]
        check_room(prompts, params, engine, "prompt")
        skip = body.flag("skip_special_tokens", True)
        request.plan = Plan(prompts, params, cache_salt=salt, skip_special_tokens=skip)
        if echo:
            request._echoed = [_echo(text, model, skip) for text in texts]
        return request

    def opening(self, index: int) -> dict[str, Any] | None:
        if self._echoed is None:
            return None
        return self._choice(index, self._echo_of(index), [], None)

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        return [self._choice(delta.index, delta.text, delta.tokens, delta.finish_reason)]

    def answer_choice(
        self, index: int, text: str, tokens: list[ShownToken], finish_reason: str
    ) -> dict[str, Any]:
        return self._choice(index, self._echo_of(index) + text, tokens, finish_reason)

    def _echo_of(self, index: int) -> str:
        return "" if self._echoed is None else self._echoed[index // self.plan.params.n]

    def _choice(
        self, index: int, text: str, tokens: list[ShownToken], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._top is not None:
            logprobs = completion_logprobs(self.model.tokenizer, tokens, self._top)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }


async def prompt_ids(
    prompt: str | list[int], model: ServedModel, engine: EngineLike, *, add_special_tokens: bool
) -> list[int]:
    """Token ids of one prompt, given as text or as ids."""
    if isinstance(prompt, list):
        check_token_ids(prompt, model, "prompt")
        return prompt
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InvalidRequestError(
            "This model has no tokenizer; send the prompt as a list of token ids.",
            "prompt",
            code="no_tokenizer",
        )
    check_text_size(prompt, model, engine, "prompt")
    return await in_thread_if_long(
        len(prompt), lambda: tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    )


def _split_prompts(value: Any) -> list[str | list[int]]:
    """The field `prompt`: a string, a list of strings, token ids, or a list of lists of ids."""
    if value is None:
        raise InvalidRequestError("prompt is missing.", "prompt", code="missing_field")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise wrong_type("prompt", "a string, a list of strings or token ids", value)
    if not value:
        raise InvalidRequestError("prompt is an empty list.", "prompt", code="empty_prompt")
    if isinstance(value[0], str | list):
        return [_one_prompt(item) for item in value]
    return [check_integers("prompt", value)]


def _one_prompt(item: Any) -> str | list[int]:
    if isinstance(item, str):
        return item
    if isinstance(item, list):
        return check_integers("prompt", item)
    raise wrong_type("prompt", "a list of strings or of lists of token ids", item, part=True)


def _echo(prompt: str | list[int], model: ServedModel, skip_special_tokens: bool) -> str:
    if isinstance(prompt, str):
        return prompt
    if model.tokenizer is None:
        raise InvalidRequestError(
            "This model has no tokenizer, so it cannot echo the prompt as text.",
            "echo",
            code="no_tokenizer",
        )
    return model.tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)


def _check_best_of(body: Body, n: int) -> None:
    best_of = body.integer("best_of")
    if best_of is not None and best_of != n:
        raise InvalidRequestError(
            f"best_of ({best_of}) must equal n ({n}): answers are not ranked.",
            "best_of",
            code="unsupported_parameter",
        )
