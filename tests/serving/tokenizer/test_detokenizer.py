"""Streams of tokens: characters stay whole, streams equal whole answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from serving.tokenizer import Tokenizer
from serving.tokenizer.pieces import byte_alphabet
from tests.serving.tokenizer import folders

STAND_INS = sorted(pre_tokenizers.ByteLevel.alphabet())
ID_OF_BYTE = {byte: STAND_INS.index(stand) for stand, byte in byte_alphabet().items()}
TEXTS = st.text(alphabet=st.sampled_from("ab 中文编译原理é😀👩\u200d🚀\n"), max_size=30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = Tokenizer.from_folder(folders.byte_level(tmp_path_factory.mktemp("byte")))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = Tokenizer.from_folder(folders.sentence_piece(tmp_path_factory.mktemp("sp")))
    assert found is not None
    return found


def test_the_byte_alphabet_is_the_library_s() -> None:
    assert sorted(byte_alphabet()) == STAND_INS
    assert sorted(byte_alphabet().values()) == list(range(256))


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(1, 7), max_size=20))
def test_random_bytes_in_random_pieces(tokenizer: Tokenizer, data: bytes, cuts: list[int]) -> None:
    ids = [ID_OF_BYTE[byte] for byte in data]
    detokenizer = tokenizer.detokenizer()
    text, rest = "", list(ids)
    for cut in cuts:
        text += detokenizer.feed(rest[:cut])
        rest = rest[cut:]
    text += detokenizer.feed(rest) + detokenizer.finish()
    assert text == data.decode("utf-8", "replace") == tokenizer.decode(ids)
    assert detokenizer.shown_chars == detokenizer.decoded_chars == len(text)
    assert not detokenizer.pending


@given(data=st.binary(max_size=40))
def test_whole_text_equals_the_library(tokenizer: Tokenizer, data: bytes) -> None:
    ids = [ID_OF_BYTE[byte] for byte in data]
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


@given(text=TEXTS)
def test_every_streamed_prefix_is_a_prefix_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = tokenizer.detokenizer()
    seen = ""
    for token_id in tokenizer.encode(text):
        seen += detokenizer.feed([token_id])
        assert text.startswith(seen)
        assert "\ufffd" not in seen
    assert seen + detokenizer.finish() == text


@settings(max_examples=200)
@given(
    text=TEXTS,
    stop=st.lists(st.text(alphabet="ab 中文😀", min_size=1, max_size=3), min_size=1, max_size=3),
    step=st.integers(1, 5),
)
def test_no_part_of_a_stop_string_is_streamed(
    tokenizer: Tokenizer, text: str, stop: list[str], step: int
) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.detokenizer(stop)
    answer = whole.feed(ids) + whole.finish()
    stream = tokenizer.detokenizer(stop)
    seen = ""
    for start in range(0, len(ids), step):
        seen += stream.feed(ids[start : start + step])
        assert answer.startswith(seen)
    assert seen + stream.finish() == answer
    assert stream.stop_string == whole.stop_string
    assert stream.num_tokens == whole.num_tokens
    if whole.stop_string is None:
        assert answer == text
    else:
        assert text.startswith(answer + whole.stop_string)
    assert not any(s in answer for s in stop)


def test_a_held_text_that_was_no_stop_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer(["hello world"])
    assert detokenizer.feed(tokenizer.encode("say hello")) == "say "
    assert detokenizer.finish() == "hello"


def test_an_incomplete_last_character_becomes_one_replacement(tokenizer: Tokenizer) -> None:
    ids = [ID_OF_BYTE[byte] for byte in "编".encode()[:2]]
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.feed(ids) == ""
    assert detokenizer.pending
    assert detokenizer.finish() == "\ufffd"
    assert tokenizer.decode(ids) == "\ufffd"


def test_min_tokens_puts_stop_strings_off(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ababab")
    detokenizer = tokenizer.detokenizer(["ab"], min_tokens=3)
    assert detokenizer.feed(ids) == "ab"
    assert (detokenizer.stop_string, detokenizer.num_tokens) == ("ab", 4)


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hello<think>中文<|im_end|>")
    assert tokenizer.decode(ids) == "hello<think>中文"
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == "<|im_start|>hello<think>中文<|im_end|>"


def test_ids_without_a_token_are_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([10_000_000, *tokenizer.encode("hello")]) == "hello"


@given(text=st.text(alphabet="abc é中😀", max_size=20))
def test_sentence_piece_text_comes_back(pieces: Tokenizer, text: str) -> None:
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text == pieces._backend.decode(ids)


def test_sentence_piece_keeps_the_space_of_a_continuation(pieces: Tokenizer) -> None:
    ids = pieces.encode("a b")
    carried_on = pieces.detokenizer()
    assert carried_on.feed(ids) + carried_on.finish() == " a b"
    own_text = pieces.detokenizer(starts_text=True)
    assert own_text.feed(ids) + own_text.finish() == "a b"


def test_window_decoding_streams_what_the_whole_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folders.word_piece(tmp_path))
    assert tokenizer is not None
    ids = tokenizer.encode("compiler parse 中 compile.")
    detokenizer = tokenizer.detokenizer()
    parts = [detokenizer.feed([token_id]) for token_id in ids]
    text = "".join(parts) + detokenizer.finish()
    assert text == tokenizer._backend.decode(ids)
    assert sum(bool(part) for part in parts) == len(ids)
