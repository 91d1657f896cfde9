"""Other ways to say a word: synonyms in either language, and the names in the other one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from random import Random

_ROOT = Path(__file__).parents[3]
PARAPHRASES = Path(__file__).with_name("paraphrases.tsv")
GLOSSARY = _ROOT / "rag" / "glossary" / "zh_en.tsv"

HAN = re.compile(r"[\u3400-\u9fff]")
WORD = re.compile(r"[A-Za-z][A-Za-z'’]*(?:-[A-Za-z]+)*")
_LONGEST = 8

_STOPWORDS = """
a about above after again all also am an and any are as at be because been before being
below between both but by can cannot could did do does doing done down during each either else
etc even every few for from further get give given had has have having he her here him his how
however i if in into is it its itself just let like made make many may me might more most much
must my no nor not now of off on once one only or other our out over own per same see shall she
should since so some such take than that the their them then there these they this those
though through thus to too two under until up upon us use used uses using very via was way we
well were what when where whether which while who whom whose why will with within without would
yes yet you your"""
STOPWORDS = frozenset(_STOPWORDS.split())
_ENDINGS = (
    ("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("ing", ""),
    ("ing", "e"), ("ied", "y"), ("ed", ""), ("ed", "e"), ("es", ""), ("es", "e"), ("s", ""),
    ("ly", ""), ("er", ""),
)  # fmt: skip


def common_characters() -> list[str]:
    """Return the 3,755 characters of GB 2312's first level."""
    codes = (bytes([row, cell]) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF))
    decoded = (code.decode("gb2312", errors="ignore") for code in codes)
    return [character for character in decoded if character]


def read_rows(file: Path) -> list[tuple[list[str], list[str]]]:
    """Return (Chinese variants, English variants) of each row of a table like the glossary."""
    rows = []
    for line in file.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            chinese, english = line.split("\t")[:2]
            rows.append((chinese.split("|"), [e.strip() for e in english.split("|")]))
    return rows


def base_forms(word: str) -> list[str]:
    """Return a word in lower case and what it may be an inflection of."""
    low = word.lower()
    forms = [low]
    for ending, put in _ENDINGS:
        if low.endswith(ending) and len(low) - len(ending) >= 3:
            stem = low[: len(low) - len(ending)]
            forms.append(stem + put)
            if not put and len(stem) > 3 and stem[-1] == stem[-2]:
                forms.append(stem[:-1])
    return forms


def inflect(word: str, like: str) -> str:
    """Return `word` with the ending that `like` has: a plural for a plural, -ing for -ing."""
    low = like.lower()
    if " " in word or not word.isalpha() or len(word) < 3:
        return word
    if low.endswith("ing") and len(low) > 5:
        return (word[:-1] if word.endswith("e") else word) + "ing"
    if low.endswith("ed") and len(low) > 4:
        return word + ("d" if word.endswith("e") else "ed")
    if low.endswith("s") and not low.endswith("ss"):
        return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
    return word


class Lexicon:
    """Synonyms and translations; built from own tables, the glossary and WordNet rows."""

    def __init__(
        self,
        words: Iterable[Sequence[str]] = (),
        definitions: Iterable[tuple[str, str]] = (),
    ) -> None:
        self.terms = read_rows(GLOSSARY)
        self.everyday = read_rows(PARAPHRASES)
        self._english: dict[str, list[str]] = {}
        self._chinese: dict[str, list[str]] = {}
        self._to_chinese: dict[str, list[str]] = {}
        self._to_english: dict[str, list[str]] = {}
        for chinese, english in [*self.everyday, *self.terms]:
            for one in chinese:
                _extend(self._chinese, one, [c for c in chinese if c != one])
                _extend(self._to_english, one, english)
            for one in english:
                low = one.lower()
                _extend(self._english, low, [e for e in english if e != one])
                _extend(self._to_chinese, low, chinese)
        for group in words:
            for one in group:
                _extend(self._english, one, [w for w in group if w != one], limit=6)
        for word, meaning in definitions:
            if meaning.count(" ") < 4 and "(" not in meaning:
                _extend(self._english, word, [meaning], limit=8)
        #: Rows of the everyday table that are verbs, in the table's order.
        self.verbs = [*self.everyday[:74], *self.everyday[174:200]]

    def english(self, word: str, rng: Random) -> str:
        """Return a synonym of an English word, inflected alike, or the word itself."""
        for form in base_forms(word):
            found = self._english.get(form)
            if found:
                return inflect(rng.choice(found), word)
        return word

    def chinese_words(self, text: str) -> list[str]:
        """Cut Chinese text at known words, longest first; the rest stays in single characters."""
        return _cut(text, self._chinese)

    def chinese(self, word: str, rng: Random) -> str:
        found = self._chinese.get(word)
        return rng.choice(found) if found else word

    def in_english(self, text: str, rng: Random) -> list[tuple[str, str]]:
        """Return (Chinese as written, an English name) for known words of a Chinese text."""
        return [
            (word, rng.choice(self._to_english[word]))
            for word in self.chinese_words(text)
            if len(word) > 1 and word in self._to_english
        ]

    def translated(self, sentence: str, rng: Random) -> list[tuple[str, str]]:
        """Return (English as written, a Chinese name) for known words of an English sentence."""
        words = list(WORD.finditer(sentence))
        found: list[tuple[str, str]] = []
        place = 0
        while place < len(words):
            for size in (4, 3, 2, 1):
                group = words[place : place + size]
                text = sentence[group[0].start() : group[-1].end()]
                if len(group) < size or (size == 1 and text.lower() in STOPWORDS):
                    continue
                head, _, last = text.lower().rpartition(" ")
                names = next(
                    (
                        self._to_chinese[key]
                        for form in base_forms(last)
                        if (key := f"{head} {form}".strip()) in self._to_chinese
                    ),
                    None,
                )
                if names:
                    found.append((text, rng.choice(names)))
                    place += size
                    break
            else:
                place += 1
        return found

    def names(self, question: str) -> list[tuple[str, str]]:
        """Return (Chinese term, its usual English name) for glossary terms in a question."""
        glossary = _glossary_names()
        seen: dict[str, str] = {}
        for word in _cut(question, glossary):
            if len(word) > 1 and word in glossary:
                seen.setdefault(word, glossary[word])
        return list(seen.items())


@cache
def _glossary_names() -> dict[str, str]:
    return {c: english[0] for chinese, english in read_rows(GLOSSARY) for c in chinese}


def _cut(text: str, known: dict[str, list[str]] | dict[str, str]) -> list[str]:
    words = []
    place = 0
    while place < len(text):
        for size in range(min(_LONGEST, len(text) - place), 1, -1):
            if text[place : place + size] in known:
                break
        else:
            match = WORD.match(text, place)
            size = match.end() - place if match else 1
        words.append(text[place : place + size])
        place += size
    return words


def _extend(table: dict[str, list[str]], key: str, values: Iterable[str], limit: int = 12) -> None:
    entry = table.setdefault(key, [])
    for value in values:
        if value not in entry and len(entry) < limit:
            entry.append(value)
