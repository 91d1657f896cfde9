"""The chat: conversations of a course, answers that stream in, citations that open."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import streamlit as st

from web import components, passages
from web.client import ApiError
from web.courses import as_name, pick_course
from web.errors import sentence
from web.markdown import as_text, cited, safe
from web.session import Viewer
from web.sse import Event
from web.stream import AnswerReader
from web.views import conversations

_QUESTION_LIMIT = 8000
# The script looks up from waiting this often; a click is served no later.
_STEP_SECONDS = 0.25
_ASSISTANT = ":material/school:"
_PERSON = ":material/person:"


def render(viewer: Viewer) -> None:
    course = pick_course(viewer, drop=("conversation",))
    if course is None:
        return
    question = _take_question()
    conversation = conversations.current(viewer, course)
    if question is not None and conversation is None:
        conversation = conversations.start(viewer, course, question)
    conversations.show_list(viewer, course, conversation)
    components.citation_clicks(partial(_open_cited, course["id"], conversation))
    passages.show_open_passage(viewer)

    messages = conversation["messages"] if conversation else []
    running = question is not None or bool(messages and messages[-1]["state"] == "streaming")
    with st.bottom:
        stop = st.empty()
        st.chat_input(
            viewer.t("chat.placeholder"),
            key="question",
            max_chars=_QUESTION_LIMIT,
            disabled=running,
            on_submit=_submit,
        )
    if conversation is None:
        _welcome(viewer, course)
        return
    conversations.show_title(viewer, conversation)
    _untrained_note(viewer)
    _indexing_note(viewer, course)
    for message in messages:
        if message["state"] != "streaming":
            _show_message(viewer, course, message)
    if running:
        stop.button(
            viewer.t("chat.stop"),
            key="stop",
            icon=":material/stop_circle:",
            on_click=_stop,
            args=(viewer, conversation["id"]),
        )
    if question is not None:
        with st.chat_message("user", avatar=_PERSON):
            st.markdown(safe(question))
        ask = viewer.api.ask(conversation["id"], question)
        _follow(viewer, course, conversation, {}, ask, question=question)
    elif running:
        attach = viewer.api.attach(conversation["id"])
        _follow(viewer, course, conversation, messages[-1], attach)
    else:
        _show_refused(viewer, conversation)


# -- what people do ---------------------------------------------------------------------------


def _submit() -> None:
    st.session_state["asked"] = st.session_state["question"]
    st.session_state.pop("refused", None)


def _suggest(question: str) -> None:
    st.session_state["asked"] = question


def _take_question() -> str | None:
    asked = st.session_state.pop("asked", None)
    return asked.strip() or None if isinstance(asked, str) else None


def _stop(viewer: Viewer, conversation_id: Any) -> None:
    try:
        viewer.api.stop(conversation_id)
    except ApiError as error:
        st.toast(sentence(viewer, error), icon=":material/error:")


def _open_cited(course_id: Any, conversation: dict[str, Any] | None) -> None:
    """A click on `#cite-MESSAGE-n` in an answer."""
    target = st.session_state["citations"].get("open")
    if conversation is None or not isinstance(target, str):
        return
    message_id, _, number = target.rpartition("-")
    for message in conversation["messages"]:
        if str(message["id"]) == message_id:
            for passage in message.get("passages") or []:
                if str(passage["n"]) == number:
                    passages.open_passage(course_id, passage["id"], passage["n"])


# -- what people see --------------------------------------------------------------------------


def _untrained_note(viewer: Viewer) -> None:
    if viewer.model.get("untrained"):
        st.caption(f":orange-badge[:material/science: {viewer.t('chat.untrained')}]")
    elif viewer.model.get("available") is False:
        st.warning(viewer.t("chat.no_model"), icon=":material/cloud_off:")


def _indexing_note(viewer: Viewer, course: dict[str, Any]) -> None:
    """Until all documents can be found, an answer may lack passages; people should know why."""
    states = [document["state"] for document in viewer.api.documents(course["id"])]
    ready = states.count("ready")
    whole = len(states) - states.count("failed")
    if ready < whole:
        note = viewer.t("chat.indexing", ready=ready, whole=whole)
        st.caption(f":blue-badge[:material/hourglass_top: {note}]")


def _welcome(viewer: Viewer, course: dict[str, Any]) -> None:
    st.space("large")
    st.title(viewer.t("chat.welcome"), anchor=False)
    st.markdown(viewer.t("chat.welcome_body", course=f"**{as_text(as_name(course))}**"))
    _untrained_note(viewer)
    _indexing_note(viewer, course)
    st.caption(viewer.t("chat.try"))
    for number in (1, 2, 3):
        suggestion = viewer.t(f"chat.suggestion_{number}")
        st.button(
            suggestion,
            key=f"suggestion-{number}",
            icon=":material/lightbulb:",
            on_click=_suggest,
            args=(suggestion,),
        )


def _left_out(viewer: Viewer, left_out: dict[str, Any] | None) -> None:
    turns = int((left_out or {}).get("turns") or 0)
    omitted = int((left_out or {}).get("passages") or 0)
    if turns or omitted:
        which = "both" if turns and omitted else "turns" if turns else "passages"
        said = viewer.t(f"chat.left_out_{which}", turns=turns, passages=omitted)
        st.caption(f":material/content_cut: {said}")


def _show_message(viewer: Viewer, course: dict[str, Any], message: dict[str, Any]) -> None:
    if message["role"] == "user":
        with st.chat_message("user", avatar=_PERSON):
            st.markdown(safe(message["content"]))
        return
    found = message.get("passages") or []
    numbers = {passage["n"] for passage in found}
    with st.chat_message("assistant", avatar=_ASSISTANT):
        if message["content"]:
            st.markdown(cited(message["content"], str(message["id"]), numbers))
        if message["state"] == "stopped":
            st.caption(f":material/stop_circle: {viewer.t('chat.stopped')}")
        elif message["state"] == "failed":
            st.error(_failure(viewer, message.get("error")), icon=":material/error:")
        _left_out(viewer, message.get("left_out"))
        passages.show_found(
            viewer,
            course["id"],
            str(message["id"]),
            found,
            set(message.get("citations") or []),
            answering=False,
        )


def _failure(viewer: Viewer, error: Any) -> str:
    """A stored failure as a sentence: the backend keeps a sentence or an error object."""
    if isinstance(error, dict):
        return sentence(
            viewer, ApiError(str(error.get("message") or ""), code=str(error.get("code") or ""))
        )
    return safe(str(error)) if error else viewer.t("chat.failed")


def _show_refused(viewer: Viewer, conversation: dict[str, Any]) -> None:
    """A question that the backend did not take is shown with the reason; it is not stored."""
    refused = st.session_state.get("refused")
    if refused is None or refused["conversation"] != conversation["id"]:
        return
    with st.chat_message("user", avatar=_PERSON):
        st.markdown(safe(refused["question"]))
    st.error(refused["reason"], icon=":material/error:")


def _follow(
    viewer: Viewer,
    course: dict[str, Any],
    conversation: dict[str, Any],
    message: dict[str, Any],
    stream: AbstractContextManager[Iterator[Event]],
    *,
    question: str | None = None,
) -> None:
    """Show an answer while it is written; afterwards the stored transcript is shown instead.

    `message` is what is stored of a running answer, empty for a new question.
    """
    ended, started, text = False, time.monotonic(), ""
    found = message.get("passages") or []
    message_id = str(message.get("id") or "new")
    with st.chat_message("assistant", avatar=_ASSISTANT):
        above, body, below = st.empty(), st.empty(), st.empty()

        def show_found() -> None:
            with above.container():
                _left_out(viewer, message.get("left_out"))
                passages.show_found(viewer, course["id"], message_id, found, set(), answering=True)

        if found:
            show_found()
        try:
            with AnswerReader(stream) as reader:
                for batch in reader.batches(_STEP_SECONDS):
                    for event in batch:
                        if event.name == "passages":
                            message = {**message, **event.data}
                            found = event.data.get("passages") or []
                            message_id = str(event.data.get("message_id") or message_id)
                            show_found()
                        elif event.name == "delta":
                            text += str(event.data.get("text") or "")
                        elif event.name in {"done", "error"}:
                            ended = True
                    numbers = {passage["n"] for passage in found}
                    if text:
                        body.markdown(cited(text, message_id, numbers) + " ▍")
                        below.empty()
                    else:
                        waited = int(time.monotonic() - started)
                        key = "chat.answering" if found else "chat.searching"
                        below.caption(f":material/hourglass_top: {viewer.t(key, seconds=waited)}")
        except ValueError:
            ended = False  # a broken event: the stored transcript says what became of the answer
        except ApiError as error:
            if question is None or error.code == "backend_unreachable":
                below.error(sentence(viewer, error), icon=":material/error:")
                st.button(viewer.t("chat.look_again"), icon=":material/refresh:")
                return
            st.session_state["refused"] = {
                "conversation": conversation["id"],
                "question": question,
                "reason": sentence(viewer, error),
            }
            st.rerun()
        if ended:
            st.rerun()
        below.warning(viewer.t("chat.cut"), icon=":material/link_off:")
        st.button(viewer.t("chat.look_again"), icon=":material/refresh:")
