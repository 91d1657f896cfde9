"""What is embedded and indexed of a passage, and what is asked of each leg for a question."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from rag.glossary import Glossary
from rag.passages import PassageDraft
from rag.tokens import cjk_share, has_cjk, tokenize

#: Above this share of Chinese letters a text means nothing to an English embedder.
CHINESE_SHARE = 0.12
#: Weights of an English word that stands for a Chinese one, beside 1 for a word that is written.
#: A Chinese question brings several native words for each term (the word, its parts, its pairs),
#: so its English words have to count more to reach English passages among Chinese ones; Chinese
#: passages carry theirs lightly, or they would crowd English passages out.
QUERY_GLOSS = 1.25
PASSAGE_GLOSS = 0.25
#: Weight of words of the title and heading path, which the passage itself need not repeat.
HEADING_WEIGHT = 0.5
#: English names of one Chinese term that are searched for.
_VARIANTS = 4

_LINK = re.compile(r"!?\[([^\]]*)\]\((?:[^()\s]|\([^()\s]*\))*(?:\s+\"[^\"]*\")?\)")
_FENCE_LINE = re.compile(r"^[ \t>]*(?:`{3,}|~{3,}).*$", re.MULTILINE)
_TABLE_RULE = re.compile(
    r"^[ \t>]*\|?[ \t]*:?-{2,}:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$", re.M
)
_MARKS = re.compile(
    r"^[ \t]*(?:#{1,6}|>)[ \t]+|\*\*|__|`+|<!--.*?-->|</?[a-zA-Z][^>\n]{0,200}>", re.M
)


@dataclass(frozen=True, slots=True)
class QueryForms:
    """A question for both legs; `dense` is None where the embedder could not read it."""

    dense: str | None
    sparse: dict[str, float]


def readable(text: str) -> str:
    """Return a passage without link targets, fences, marks and table rules."""
    text = _LINK.sub(r"\1", text)
    text = _TABLE_RULE.sub("", _FENCE_LINE.sub("", text))
    return re.sub(r"\n{2,}", "\n", _MARKS.sub("", text)).strip()


def heading_line(draft: PassageDraft, title: str) -> str:
    """Return title and heading path, each name once."""
    return " > ".join(dict.fromkeys(part for part in (title, *draft.heading_path) if part))


def dense_document(
    draft: PassageDraft, title: str, glossary: Glossary, *, english_only: bool
) -> str:
    """Return the text of a passage that is embedded."""
    text = f"{heading_line(draft, title)}\n{readable(draft.text)}"
    if english_only and cjk_share(text) > CHINESE_SHARE:
        return glossary.translate(text) or text
    return text


def sparse_document(draft: PassageDraft, title: str, glossary: Glossary) -> dict[str, float]:
    """Return the weighted words of a passage."""
    counts: Counter[str] = Counter()
    _count(counts, draft.text, glossary, 1.0)
    _count(counts, heading_line(draft, title), glossary, HEADING_WEIGHT)
    return dict(counts)


def query_forms(query: str, glossary: Glossary, *, english_only: bool) -> QueryForms:
    """Return what to ask of each leg. Chinese terms add their English names to the sparse one."""
    dense: str | None = query
    if english_only and has_cjk(query):
        dense = glossary.translate(query)
        if not any(character.isalpha() for character in dense):
            dense = None
    words: dict[str, float] = dict(Counter(tokenize(query)))
    for word, weight in _glosses(query, glossary).items():
        words[word] = max(words.get(word, 0.0), weight * QUERY_GLOSS)
    return QueryForms(dense, words)


def _count(counts: Counter[str], text: str, glossary: Glossary, weight: float) -> None:
    for word in tokenize(text):
        counts[word] += weight  # type: ignore[assignment]
    if has_cjk(text):
        for word, share in _glosses(text, glossary).items():
            counts[word] += share * PASSAGE_GLOSS * weight  # type: ignore[assignment]


def _glosses(text: str, glossary: Glossary) -> dict[str, float]:
    """Return the English words of the Chinese terms in `text`; other names count less."""
    words: dict[str, float] = {}
    for term in glossary.find(text):
        seen: dict[str, float] = {}
        for number, name in enumerate(term.english[:_VARIANTS]):
            for word in tokenize(name):
                seen.setdefault(word, 1.0 if number == 0 else 0.6)
        for word, share in seen.items():
            words[word] = words.get(word, 0.0) + share
    return words
