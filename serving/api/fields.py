"""Which fields of a body are honoured, which are refused, and which may be ignored.

A field is honoured, or refused with a 400 that names it. Ignored are only those that ask for
nothing a client could miss in the answer, and names that nobody here knows: those are listed in
the response header `x-lectern-ignored`, unless they look like a misspelling, which is refused.
"""

from __future__ import annotations

import difflib
from typing import Any

from serving.api.body import Body
from serving.errors import InvalidRequestError

SAMPLING = frozenset(
    {
        "frequency_penalty", "ignore_eos", "logprobs", "max_tokens", "min_p", "min_tokens",
        "presence_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids",
        "temperature", "top_k", "top_p",
    }
)  # fmt: skip
COMMON = SAMPLING | {
    "add_special_tokens", "cache_salt", "model", "n", "skip_special_tokens", "stream",
    "stream_options",
}  # fmt: skip
CHAT = COMMON | {
    "add_generation_prompt", "chat_template_kwargs", "max_completion_tokens", "messages",
    "reasoning_effort", "top_logprobs",
}  # fmt: skip
COMPLETION = COMMON | {"best_of", "echo", "prompt"}

#: Harmless: they label a request, or hint at what is done anyhow.
IGNORED = frozenset(
    {
        "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "request_id", "safety_identifier",
        "service_tier", "spaces_between_special_tokens", "store", "user",
    }
)  # fmt: skip

_TOOLS = "This engine does not call tools yet."
_STRUCTURE = "This engine does not constrain the form of its answers."
_TEXT_ONLY = "This engine reads and writes text only."
_LENGTH = "Give the length of the answer as max_tokens."

#: name -> (values that ask for nothing, what to say about any other value)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tools": (([],), _TOOLS),
    "functions": (([],), _TOOLS),
    "tool_choice": (("none", "auto"), _TOOLS),
    "function_call": (("none", "auto"), _TOOLS),
    "response_format": (({"type": "text"},), _STRUCTURE),
    "structured_outputs": (({},), _STRUCTURE),
    "guided_json": ((), _STRUCTURE),
    "guided_regex": ((), _STRUCTURE),
    "guided_choice": ((), _STRUCTURE),
    "guided_grammar": ((), _STRUCTURE),
    "audio": ((), _TEXT_ONLY),
    "modalities": ((["text"],), _TEXT_ONLY),
    "web_search_options": ((), "This engine does not search the web."),
    "moderation": ((), "This engine does not moderate."),
    "verbosity": (("medium",), "This engine cannot set how wordy an answer is."),
    "logit_bias": (({},), "This engine does not bias single tokens."),
    "bad_words": (([],), "This engine does not bias single tokens."),
    "allowed_token_ids": ((), "This engine does not bias single tokens."),
    "logits_processors": (([],), "This engine runs no code of a request."),
    "suffix": (("",), "This engine does not fill in the middle of a text."),
    "use_beam_search": ((False,), "This engine samples; it has no beam search."),
    "length_penalty": ((1, 1.0), "This engine samples; it has no beam search."),
    "early_stopping": ((False,), "This engine samples; it has no beam search."),
    "typical_p": ((1, 1.0), "This engine has top_k, top_p and min_p."),
    "prompt_logprobs": ((), "This engine gives log probabilities of the answer only."),
    "prompt_embeds": ((), "Give the prompt as text or token ids."),
    "truncate_prompt_tokens": ((), "Shorten the prompt before sending it."),
    "include_stop_str_in_output": ((False,), "Stop strings are never part of the answer."),
    "include_reasoning": ((True,), "This engine does not separate reasoning from the answer."),
    "thinking": (({"type": "disabled"},), "Use chat_template_kwargs if the model has a switch."),
    "enable_thinking": ((), "Put it into chat_template_kwargs."),
    "continue_final_message": ((False,), "The last message cannot be carried on."),
    "chat_template": ((), "The chat template comes with the model."),
    "documents": (([],), "Put documents into the messages."),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
    "return_token_ids": ((False,), "Use /tokenize for token ids."),
    "return_tokens_as_token_ids": ((False,), "Use /tokenize for token ids."),
    "return_token_strs": ((False,), "Use /detokenize for the text of tokens."),
    "priority": ((0,), "The engine takes it from the header X-Lectern-Priority."),
    "max_new_tokens": ((), _LENGTH),
    "max_output_tokens": ((), _LENGTH),
    "max_length": ((), _LENGTH),
}

_MISSPELT = 0.8  # similarity above which an unknown name is taken for a misspelling


def check_fields(body: Body, honoured: frozenset[str]) -> list[str]:
    """Refuse what cannot be honoured; return the unknown names that are ignored."""
    unknown: list[str] = []
    for name, value in body.fields.items():
        if name in honoured or name in IGNORED:
            continue
        if name in REFUSED:
            neutral, message = REFUSED[name]
            if not any(_same(value, other) for other in neutral):
                raise InvalidRequestError(
                    f"{name} is not supported: {message}", name, code="unsupported_parameter"
                )
            continue
        close = difflib.get_close_matches(name[:64], honoured, 1, _MISSPELT)
        if close:
            raise InvalidRequestError(
                f"There is no field {name[:64]!r}; did you mean {close[0]!r}?",
                name[:64],
                code="unknown_parameter",
            )
        unknown.append(name)
    return unknown


def _same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def ignored_header(names: list[str]) -> dict[str, str]:
    """A response header that tells which unknown fields were ignored."""
    if not names:
        return {}
    readable = (
        "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "?" for c in name[:40])
        for name in sorted(names)[:20]
    )
    return {"x-lectern-ignored": ", ".join(readable)}
