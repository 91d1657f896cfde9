"""Invented facts with several wordings in Chinese and English, and questions in other words.

A frame says one thing: `zh` and `en` are ways to write it, `ask_zh` and `ask_en` ways to ask for
it. Slots: {a} {b} {c} are terms of the glossary, {v} {w} everyday words, {n} {m} numbers, {i} an
identifier, {k} a command. A slot is written with one of its names in the text and with another
in the question, so that words alone do not always tell.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from random import Random

from serving.demo_model.training.corpus import Passage, make_passage
from serving.demo_model.training.lexicon import Lexicon

_DAYS = (
    ("一", "Monday"),
    ("二", "Tuesday"),
    ("三", "Wednesday"),
    ("四", "Thursday"),
    ("五", "Friday"),
)
_COMMANDS = ("run", "make", "check", "tool", "lab", "sim", "trace", "pack", "scan", "sync")
_OPENINGS_ZH = ("需要说明的是，", "注意，", "另外，", "在本课中，", "一般来说，", "此外，")
_OPENINGS_EN = ("Note that ", "In this course, ", "As a rule, ", "Besides, ", "In practice, ")


@dataclass(frozen=True, slots=True)
class Frame:
    zh: tuple[str, ...]
    en: tuple[str, ...]
    ask_zh: tuple[str, ...]
    ask_en: tuple[str, ...]


def _parse(text: str) -> list[Frame]:
    frames = []
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for place in range(0, len(lines), 4):
        parts = [tuple(line.split(": ", 1)[1].split("|")) for line in lines[place : place + 4]]
        frames.append(Frame(*parts))
    return frames


FRAMES = _parse(Path(__file__).with_name("frames.txt").read_text("utf-8"))
_Slot = tuple[list[str], list[str]]


def identifier(rng: Random) -> str:
    """Return a made-up identifier, option or error code that nothing else contains."""
    letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 5)))
    more = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 6)))
    number = rng.randint(0, 9999)
    return rng.choice((
        f"{letters}_{more}", f"{letters}{more.capitalize()}", f"E{number:04d}", f"{letters}.{more}",
        f"{letters.upper()}_{more.upper()}", f"{letters}-{number}", f"{letters}::{more}",
    ))  # fmt: skip


def command(rng: Random) -> str:
    name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))
    return rng.choice((f"{rng.choice(_COMMANDS)} --{name}", f"--{name}={rng.randint(1, 99)}",
                       f"{name} {rng.choice(_COMMANDS)} -{rng.choice('abcdfgnqrst')}",
                       f"./{name}.sh"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """A frame with its slots filled: ways to write it and to ask for it."""

    frame: Frame
    slots: dict[str, _Slot]

    def write(self, rng: Random, chinese: bool) -> str:
        template = rng.choice(self.frame.zh if chinese else self.frame.en)
        # A text mostly uses the usual name of a thing.
        text = self._fill(template, rng, chinese, usual=0.7)
        if rng.random() < 0.15:
            opening = rng.choice(_OPENINGS_ZH if chinese else _OPENINGS_EN)
            text = opening + (text if chinese else text[0].lower() + text[1:])
        return text

    def ask(self, rng: Random, chinese: bool) -> str:
        template = rng.choice(self.frame.ask_zh if chinese else self.frame.ask_en)
        return self._fill(template, rng, chinese, usual=0.4)

    def _fill(self, template: str, rng: Random, chinese: bool, usual: float) -> str:
        filled = {}
        for name, (zh, en) in self.slots.items():
            names = zh if chinese else en
            filled[name] = names[0] if rng.random() < usual else rng.choice(names)
        text = template.format(**filled)
        return text if chinese else text[0].upper() + text[1:]


def fact(rng: Random, lexicon: Lexicon, topic: _Slot | None = None) -> Fact:
    """Fill a random frame; `topic` takes the place of its first term."""
    slots: dict[str, _Slot] = {}
    for name in "abce":
        slots[name] = rng.choice(lexicon.terms)
    if topic is not None:
        slots[rng.choice("aab")] = topic
    for name in "vw":
        slots[name] = rng.choice(lexicon.verbs)
    for name in "nm":
        number = str(rng.choice((rng.randint(2, 20), rng.randint(2, 20) * 5, rng.randint(1, 300))))
        slots[name] = ([number], [number])
    for name, made in (("i", identifier(rng)), ("k", command(rng))):
        slots[name] = ([made], [made])
    day = rng.choice(_DAYS)
    slots["x"], slots["d"] = ([day[0]], [""]), ([""], [day[1]])
    hour = str(rng.randint(1, 8))
    slots["h"] = ([hour], [hour])
    room = f"{rng.choice('ABCDE')}{rng.randint(101, 520)}"
    slots["r"] = ([room], [room])
    return Fact(rng.choice(FRAMES), slots)


def passage(
    rng: Random, lexicon: Lexicon, chinese: bool, topic: _Slot | None = None
) -> tuple[Passage, list[Fact]]:
    """Make a passage of two to five facts, most of them on one topic."""
    topic = topic or rng.choice(lexicon.terms)
    facts = [
        fact(rng, lexicon, topic if rng.random() < 0.7 else None) for _ in range(rng.randint(2, 5))
    ]
    sentences = [f.write(rng, chinese) for f in facts]
    heading = rng.choice(topic[0] if chinese else topic[1])
    text = ("" if chinese else " ").join(sentences)
    made = make_passage(heading, heading, heading, [text])
    # A sentence splitter may cut a fact in two; then places of facts are those of their starts.
    starts = []
    place = 0
    for sentence in sentences:
        place = text.index(sentence, place)
        starts.append(place)
        place += len(sentence)
    kept = []
    for start in starts:
        kept.append(next(i for i, (s, e) in enumerate(made.spans) if s <= start < e))
    return made, [facts[kept.index(i)] if i in kept else facts[0] for i in range(len(made.spans))]
