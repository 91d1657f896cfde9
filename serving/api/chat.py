"""/v1/chat/completions: its fields and its frames."""

from __future__ import annotations

from typing import Any

from serving.api.body import Body
from serving.api.choice import Delta, ShownToken
from serving.api.dialect import Dialect, check_model
from serving.api.fields import CHAT, check_fields
from serving.api.generation import Plan
from serving.api.logprobs import chat_logprobs
from serving.api.messages import read_messages
from serving.api.sampling import check_room, check_text_size, read_salt, read_sampling
from serving.api.service import EngineLike, ServedModel
from serving.api.threads import in_thread_if_long
from serving.core import MAX_LOGPROBS
from serving.errors import InvalidRequestError

#: Names that a template is given by the server and not by `chat_template_kwargs`.
_RESERVED = frozenset(
    {
        "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
        "documents", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
        "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Chat(Dialect):
    """A chat request."""

    chunk_object = "chat.completion.chunk"
    answer_object = "chat.completion"
    id_prefix = "chatcmpl"

    @classmethod
    async def parse(
        cls, body: Body, model: ServedModel, engine: EngineLike, request_id: str
    ) -> Chat:
        """Check every field and build the prompt. Raises InvalidRequestError or ApiError."""
        check_model(body, model)
        request = cls(body, model, request_id)
        request.ignored = check_fields(body, CHAT)
        request._top = _top_logprobs(body)
        params = read_sampling(body, model, max_tokens=_max_tokens(body), logprobs=request._top)
        salt = read_salt(body)
        prompt = await chat_prompt(body, model, engine)
        check_room([prompt], params, engine, "messages")
        request.plan = Plan(
            [prompt],
            params,
            cache_salt=salt,
            starts_text=True,
            skip_special_tokens=body.flag("skip_special_tokens", True),
        )
        return request

    _top: int | None = None

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk_choice(index, {"role": "assistant", "content": ""}, None, None)

    def chunk_choices(self, delta: Delta) -> list[dict[str, Any]]:
        choices = []
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta.tokens)
            choices.append(self._chunk_choice(delta.index, {"content": delta.text}, logprobs, None))
        if delta.finish_reason is not None:
            choices.append(self._chunk_choice(delta.index, {}, None, delta.finish_reason))
        return choices

    def answer_choice(
        self, index: int, text: str, tokens: list[ShownToken], finish_reason: str
    ) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: list[ShownToken]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        return chat_logprobs(self.model.tokenizer, tokens, self._top)

    def _chunk_choice(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }


async def chat_prompt(body: Body, model: ServedModel, engine: EngineLike) -> list[int]:
    """Token ids of the field `messages`, by the model's chat template."""
    messages = read_messages(body.raw("messages"))
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InvalidRequestError(
            "This model has no tokenizer, so it cannot chat; send token ids as the prompt of "
            "/v1/completions.",
            "messages",
            code="no_tokenizer",
        )
    variables = _template_variables(body, model)
    opening = body.flag("add_generation_prompt", True)
    if body.flag("add_special_tokens"):
        raise InvalidRequestError(
            "add_special_tokens is not supported in chats: the template adds them.",
            "add_special_tokens",
            code="unsupported_parameter",
        )
    size = sum(len(message["content"]) for message in messages)
    for message in messages:
        check_text_size(message["content"], model, engine, "messages")
    return await in_thread_if_long(
        size,
        lambda: tokenizer.apply_chat_template(
            messages, add_generation_prompt=opening, variables=variables
        ),
    )


def _template_variables(body: Body, model: ServedModel) -> dict[str, Any]:
    variables = dict(body.mapping("chat_template_kwargs"))
    for name in variables:
        if name in _RESERVED or not name.isidentifier():
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {name[:64]!r}.", "chat_template_kwargs"
            )
    effort = body.text("reasoning_effort")
    if effort:
        if effort not in _EFFORTS:
            raise InvalidRequestError(
                f"reasoning_effort must be one of {', '.join(_EFFORTS)}.", "reasoning_effort"
            )
        template = model.tokenizer.template_text if model.tokenizer is not None else ""
        if "reasoning_effort" in template:
            variables.setdefault("reasoning_effort", effort)
        elif effort == "none":
            # Switches thinking off where the template can; elsewhere there is none to switch off.
            if "enable_thinking" in template:
                variables.setdefault("enable_thinking", False)
        else:
            raise InvalidRequestError(
                "reasoning_effort is not supported: the chat template of this model does not "
                "read it.",
                "reasoning_effort",
                code="unsupported_parameter",
            )
    return variables


def _max_tokens(body: Body) -> int | None:
    old, new = body.integer("max_tokens"), body.integer("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise InvalidRequestError(
            f"max_tokens ({old}) and max_completion_tokens ({new}) mean the same but differ; "
            "send one of them.",
            "max_tokens",
        )
    if new is not None and new < 1:
        raise InvalidRequestError(
            f"max_completion_tokens must be at least 1, not {new}.", "max_completion_tokens"
        )
    return new if new is not None else old


def _top_logprobs(body: Body) -> int | None:
    wanted = body.flag("logprobs")
    top = body.integer("top_logprobs")
    if top is None:
        return 0 if wanted else None
    if not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, not {top}.", "top_logprobs"
        )
    if not wanted and top:
        raise InvalidRequestError(
            "top_logprobs needs logprobs: true.", "top_logprobs", code="missing_field"
        )
    return top if wanted else None
