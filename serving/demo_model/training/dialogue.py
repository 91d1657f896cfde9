"""What the model says about itself and the platform: own short texts, asked in many ways."""

from __future__ import annotations

from pathlib import Path
from random import Random

_TALKS = Path(__file__).with_name("talks.txt")


def _read() -> list[tuple[list[str], list[str], str, str]]:
    rows = []
    for block in _TALKS.read_text("utf-8").strip().split("\n\n"):
        ask_zh, ask_en, say_zh, say_en = block.split("\n")
        rows.append((ask_zh.split("|"), ask_en.split("|"), say_zh, say_en))
    return rows


TALKS = _read()


def talk(rng: Random, chinese: bool) -> tuple[str, str]:
    """Return something a student says to the assistant, and the reply."""
    ask_zh, ask_en, say_zh, say_en = rng.choice(TALKS)
    asked = rng.choice(ask_zh if chinese else ask_en)
    if rng.random() < 0.2:
        asked = asked.lower()
    end = rng.choice(("？", "", "?", "！", "。") if chinese else ("?", "", "!", ".", " ?"))
    return asked + end, say_zh if chinese else say_en
