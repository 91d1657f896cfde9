"""Which passage a model in training would cite, for prompts whose right passages are known.

A probe file has one JSON object a line: `messages` (a chat up to the assistant's turn), `right`
(numbers of the passages that may be cited), `answerable` (false if it should refuse), and `set`.
`lectern eval answers --prompts FILE` writes one. Questions on documents that no training example
shows tell how far what was learnt holds for text that was never read.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer

from serving.demo_model.training.examples import Maker
from serving.demo_model.training.lexicon import HAN
from serving.demo_model.training.model import Decoder, dense_mask
from serving.demo_model.training.prompts import REFUSAL_EN, REFUSAL_ZH, answer_text, chat


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    start: int  # place of the token that decides between answer and refusal
    answer: int
    refusal: int
    right: list[int]
    answerable: bool
    kind: str


class Probe:
    """Reads off next-token choices; nothing is generated, so it takes a second."""

    def __init__(self, tokenizer: Path) -> None:
        self._encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._rows: list[_Row] = []
        self._digits = [self._ids(str(n))[0] for n in range(10)]

    def _ids(self, text: str) -> list[int]:
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def _add(
        self, prompt: str, chinese: bool, right: list[int], answerable: bool, kind: str
    ) -> None:
        lead = self._ids(answer_text(7, "x", chinese).split("7")[0])
        refusal = self._ids(REFUSAL_ZH if chinese else REFUSAL_EN)
        place = next(i for i, (a, b) in enumerate(zip(lead, refusal, strict=False)) if a != b)
        ids = self._ids(prompt)
        self._rows.append(_Row(ids + lead, len(ids) - 1 + place, lead[place], refusal[place],
                               right, answerable, kind))  # fmt: skip

    def read(self, file: Path, most: int = 600) -> None:
        """Take prompts of a probe file."""
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        Random(0).shuffle(lines)
        for line in lines[:most]:
            turns = [(m["role"], m["content"]) for m in line["messages"]]
            chinese = bool(HAN.search(turns[-1][1].rsplit("\n", 1)[-1]))
            right, answerable = list(line["right"]), bool(line["answerable"])
            self._add(chat(turns), chinese, right, answerable, line["set"])

    def make(self, maker: Maker, count: int, seed: int = 0) -> None:
        """Take `count` questions of each kind on documents, right passages below number 10."""
        rng = Random(seed)
        for kind, example in maker.on_documents().items():
            taken = 0
            while taken < count:
                made = example(rng)
                found = re.match(r"(?:According to|根据资料) \[(\d+)\]", made.answer)
                if found and int(found[1]) > 9:
                    continue
                chinese = bool(HAN.match(made.answer))
                right = [int(found[1])] if found else []
                self._add(made.read, chinese, right, bool(found), kind)
                taken += 1

    @torch.no_grad()
    def measure(self, model: Decoder, device: torch.device) -> dict[str, Any]:
        """Return by set: share of right citations, and of refusals."""
        cited: defaultdict[str, list[float]] = defaultdict(list)
        refused: defaultdict[str, list[float]] = defaultdict(list)
        model.eval()
        for row in self._rows:
            tokens = torch.tensor([row.ids], device=device)
            positions = torch.arange(len(row.ids), device=device)[None]
            mask = dense_mask(torch.zeros_like(tokens))
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model.hidden(tokens, positions, mask)
                logits = hidden[0, [row.start, -1]] @ model.embed_tokens.weight.T
            refuses = bool(logits[0, row.refusal] > logits[0, row.answer])
            if row.answerable:
                digit = int(logits[1, self._digits].argmax())
                cited[f"cite {row.kind}"].append(float(digit in row.right))
                refused[f"false refusal {row.kind}"].append(float(refuses))
            else:
                refused[f"refusal {row.kind}"].append(float(refuses))
        model.train()
        figures = {**cited, **refused}
        return {name: round(sum(f) / len(f), 3) for name, f in sorted(figures.items())}
