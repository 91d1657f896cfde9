"""Sampling fields of a body, and the room that the context leaves for the answer."""

from __future__ import annotations

from collections.abc import Sequence

from serving.api.body import Body
from serving.api.service import EngineLike, ServedModel
from serving.core import SamplingParams
from serving.errors import ContextLengthError, InvalidRequestError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_SALT = 256


def read_sampling(
    body: Body,
    model: ServedModel,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """Sampling parameters of a request, checked. `max_tokens` None means: all that fits."""
    stop = body.texts("stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"stop holds {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed.", "stop"
        )
    if any(len(text) > MAX_STOP_LENGTH for text in stop):
        raise InvalidRequestError(
            f"stop holds a string of more than {MAX_STOP_LENGTH} characters.", "stop"
        )
    if stop and model.tokenizer is None:
        raise InvalidRequestError(
            "This model has no tokenizer, so it cannot look for stop strings; use stop_token_ids.",
            "stop",
            code="no_tokenizer",
        )
    number = body.integer("n")
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.integer("min_tokens") or 0,
        temperature=body.number("temperature", 1.0),
        top_k=body.integer("top_k") or 0,
        top_p=body.number("top_p", 1.0),
        min_p=body.number("min_p", 0.0),
        repetition_penalty=body.number("repetition_penalty", 1.0),
        presence_penalty=body.number("presence_penalty", 0.0),
        frequency_penalty=body.number("frequency_penalty", 0.0),
        seed=body.integer("seed"),
        stop=stop,
        stop_token_ids=body.integers("stop_token_ids"),
        ignore_eos=body.flag("ignore_eos"),
        logprobs=logprobs,
        n=1 if number is None else number,
    )
    params.validate(model.vocab_size)
    return params


def read_salt(body: Body) -> str:
    salt = body.text("cache_salt")
    if len(salt) > MAX_SALT:
        raise InvalidRequestError(f"cache_salt is longer than {MAX_SALT} characters.", "cache_salt")
    return salt


def check_room(
    prompts: Sequence[Sequence[int]], params: SamplingParams, engine: EngineLike, param: str
) -> None:
    """Raise ContextLengthError unless each prompt and its answer fit into the context."""
    limit = engine.max_model_len
    for prompt in prompts:
        size = len(prompt)
        if size == 0:
            raise InvalidRequestError(
                f"{param} is empty; send at least one token.", param, code="empty_prompt"
            )
        if size >= limit:
            raise ContextLengthError(
                f"The context of this model is {limit} tokens, but the prompt alone has {size}; "
                "shorten the prompt.",
                param,
            )
        asked = params.max_tokens
        if asked is not None and size + asked > limit:
            raise ContextLengthError(
                f"The context of this model is {limit} tokens, but {size + asked} were asked "
                f"for: {size} in the prompt and {asked} for the answer; shorten the prompt or "
                "lower max_tokens.",
                param,
            )
        if params.min_tokens > limit - size:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}, but the prompt leaves room for "
                f"{limit - size} tokens.",
                "min_tokens",
            )


def check_text_size(text: str, model: ServedModel, engine: EngineLike, param: str) -> None:
    """Refuse a text that cannot fit before any work goes into it.

    A token covers at most `longest_token` characters; normalisation (NFC and the like) may join
    a few characters into one, for which 4 is a generous bound.
    """
    if model.tokenizer is None or len(text) < 100_000:
        return
    least = len(text) // (4 * model.tokenizer.longest_token)
    if least >= engine.max_model_len:
        raise ContextLengthError(
            f"The context of this model is {engine.max_model_len} tokens, but the prompt has at "
            f"least {least}; shorten the prompt.",
            param,
        )


def check_token_ids(ids: Sequence[int], model: ServedModel, param: str) -> None:
    for token in ids:
        if not 0 <= token < model.vocab_size:
            raise InvalidRequestError(
                f"{param} holds the token {token}, but this model's tokens are 0 to "
                f"{model.vocab_size - 1}.",
                param,
            )
