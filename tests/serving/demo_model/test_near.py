"""Pairs of sentences that say nearly the same in other words, and questions made from them."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from serving.demo_model.training import prompts
from serving.demo_model.training.corpus import NEAR, Corpus, make_passage
from serving.demo_model.training.examples import Maker
from serving.demo_model.training.near import Texts, pairs

ASKED = "Vacuuming reclaims the storage that is occupied by dead tuples."
SAME = "Removed records give back their space only after a cleanup has run."
ECHO = "Vacuuming reclaims storage occupied by dead tuples, as was said before."
OTHER = "A lexer cuts the stream of characters into tokens of the language."
MESSAGES = [
    ("could not open the given file", "无法打开给定的文件"),
    ("unable to read that document", "读不了这份文档"),
    ("the window is closed right now", "窗口现已关闭"),
]


def corpus() -> Corpus:
    texts = [ASKED, SAME, ECHO, OTHER]
    passages = [make_passage("g", f"T{n}", f"T{n}", [text]) for n, text in enumerate(texts)]
    return Corpus(passages, list(MESSAGES), [(0, 3)], collected=len(passages))


def vectors(found: Texts) -> torch.Tensor:
    """Alike are: the first three sentences and message 2; messages 0 and 1."""
    angles = {ASKED: 0.0, SAME: 0.6, ECHO: -0.1, OTHER: 2.0}
    angles |= {MESSAGES[0][0]: 3.5, MESSAGES[1][0]: 4.1, MESSAGES[2][0]: 5.6}
    turned = torch.tensor([angles[text] for text in found.texts])
    return torch.stack((turned.cos(), turned.sin()), 1)


def test_a_pair_means_the_same_and_shares_few_words() -> None:
    given = corpus()
    found = Texts.of(given)
    assert len(found.texts) == 7
    near = pairs(given, found, vectors(found))
    assert near.sentences.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 2, 0], [2, 0, 1, 0]]
    assert {2, 1} <= set(near.beside[0].tolist())
    assert near.messages.tolist() == [[0, 1], [1, 0]]
    assert near.across.tolist() == [[2, 2, 0], [2, 0, 0]]


def test_pairs_of_another_corpus_are_refused(tmp_path: Path) -> None:
    given = corpus()
    found = Texts.of(given)
    near = pairs(given, found, vectors(found))
    file = tmp_path / "corpus.jsonl.xz"
    rows = [{"k": "pair", "p": "tool", "en": en, "zh": zh} for en, zh in MESSAGES]
    with lzma.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    near.save(tmp_path / NEAR)
    with pytest.raises(ValueError, match="belongs to another corpus; make it again"):
        Corpus.load(file)
    near.counts[:] = (0, 3)
    near.save(tmp_path / NEAR)
    loaded = Corpus.load(file).near
    assert loaded is not None
    assert (loaded.sentences == near.sentences).all()


def test_questions_from_pairs_are_answered_by_the_other_text() -> None:
    given = corpus()
    found = Texts.of(given)
    given.near = pairs(given, found, vectors(found))
    given.near = replace(
        given.near, sentences=given.near.sentences[:1], across=np.array([[0, 3, 0]], np.int32)
    )
    given.passages += [make_passage("g", "X", "X", [f"Filler number {n}."]) for n in range(20)]
    maker = Maker(given)
    rng = Random(3)
    told = set()
    for _ in range(200):
        example = maker._near(rng)
        answer = example.answer.removesuffix("<|im_end|>\n")
        if answer not in (prompts.REFUSAL_EN, prompts.REFUSAL_ZH):
            told.add(answer.split("]", 1)[1].strip(" :：").rstrip("。."))
        if answer.endswith(SAME):
            shown = example.read.split("<passage ", 1)[1].rsplit("</passage>", 1)[0]
            assert ASKED not in shown
    assert SAME.rstrip(".") in told
    assert OTHER.rstrip(".") in told
    assert {MESSAGES[0][1], MESSAGES[1][1]} & {t.split("。")[0] for t in told}
