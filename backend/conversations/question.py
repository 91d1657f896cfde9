"""From a question to a prompt: search, then rag's one function that builds prompts."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import anyio

from backend.context import Context
from backend.conversations import service
from backend.courses.models import Course
from backend.errors import ApiError
from backend.upstream import ModelInfo
from rag.glossary import Glossary
from rag.prompt import Message as PromptMessage
from rag.prompt import Prompt, PromptPassage, PromptTooLong, build_prompt

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_HISTORY_MESSAGES = 40


@dataclass(frozen=True)
class PreparedQuestion:
    """What goes to the model and what is shown beside the answer."""

    messages: list[dict[str, str]]
    passages: list[dict[str, Any]]  # numbered from 1 in the order the prompt names them
    left_out_turns: int
    left_out_passages: int
    prompt_tokens: int
    answer_tokens: int


async def prepare(
    context: Context,
    model: ModelInfo,
    course: Course,
    conversation_id: int,
    question: str,
    answer_id: int,
) -> PreparedQuestion:
    """Find passages and build the prompt; raises ApiError when the question cannot be asked."""
    found = await context.search.search(course.id, question, context.settings.passages)
    earlier = await context.database.run(service.messages, context.database, conversation_id)
    history = [
        PromptMessage(role=message.role, content=message.content)
        for message in earlier
        if message.id < answer_id and message.content.strip()
    ][:-1][-_HISTORY_MESSAGES:]
    context_tokens = model.max_model_len or context.settings.context_tokens
    reserve = min(context.settings.answer_tokens, max(1, context_tokens // 2))

    def count(messages: list[PromptMessage]) -> int:
        return context.upstream.count_tokens(model, [dict(message) for message in messages])

    def build() -> Prompt:
        return build_prompt(
            course=course.name,
            question=question,
            passages=[
                PromptPassage(p.text, p.title or p.document, tuple(p.heading_path), p.page)
                for p in found
            ],
            history=history,
            count_tokens=count,
            context_tokens=context_tokens,
            answer_reserve=reserve,
            language="zh" if _CHINESE.search(question) else "en",
            terms=_terms(context.settings.glossary, question, [p.text for p in found]),
        )

    try:
        prompt = await anyio.to_thread.run_sync(build)
    except PromptTooLong as error:
        raise ApiError(400, "context_length_exceeded", str(error)) from error
    return PreparedQuestion(
        messages=[cast(dict[str, str], dict(message)) for message in prompt.messages],
        passages=[
            {"n": number, **found[place].model_dump(mode="json")}
            for number, place in enumerate(prompt.used_passages, start=1)
        ],
        left_out_turns=prompt.left_out_turns,
        left_out_passages=len(prompt.left_out_passages),
        prompt_tokens=prompt.tokens,
        answer_tokens=max(1, min(context.settings.answer_tokens, prompt.answer_tokens)),
    )


@lru_cache(maxsize=1)
def _glossary(extra: Path | None) -> Glossary:
    return Glossary.load(extra)


def _terms(extra: Path | None, question: str, passages: list[str]) -> list[tuple[str, str]]:
    """Return English names of the Chinese terms of a question that meets English passages."""
    return _glossary(extra).names(question, passages) if _CHINESE.search(question) else []
