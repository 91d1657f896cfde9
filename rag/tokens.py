"""The words of the sparse leg: one function for passages and for questions.

Identifiers stay whole and are split as well (camelCase, snake_case, -O2, %eax); English words
are cut back to a stem; Chinese gives jieba's search words and character pairs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

from rag.stem import ENGLISH_STOPWORDS, stem

_PIECE = re.compile(
    r"""
    (?P<cjk>[\u3400-\u9fff\uf900-\ufaff]+)
  | (?P<option>(?<![\w-])--?[A-Za-z][\w+-]*)
  | (?P<name>[%$@\#]?[^\W\d]\w*(?:\+\+|\#)?|[%$@]\d+)
  | (?P<number>0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?\w*)
  | (?P<operator>->|=>|::=|::|:=|<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||\+\+|\+=|-=|\*=
      |(?<=[\s`'"(])[-+*/%&|^~!<>=?](?=[\s`'")]))
    """,
    re.VERBOSE,
)
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")
_CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_STOPWORDS = """
的 了 和 与 或 及 是 在 有 也 都 就 还 又 被 把 对 从 到 于 而 但 并 其 之 个 这 那 这个 那个
这些 那些 什么 怎么 怎样 如何 为什么 为何 为啥 哪 哪些 哪个 哪里 多少 吗 呢 吧 啊 呀 我 你 他 她
它 我们 你们 他们 它们 咱们 一个 一种 一些 可以 能 能够 会 要 应该 需要 可能 不 没 没有 不是
还是 如果 因为 所以 但是 然后 以及 时候 的话 是否 请问 请 问 讲 说 比如 例如 这样 那样 这里 那里
里 中 上 下 后 前 时 为 让 给 用 以 由 等 很 太 更 最 只 再 才 却 则 着 过 地 得 么 怎 啥
"""
_CHINESE_STOPWORDS = frozenset(_STOPWORDS.split())


def tokenize(text: str) -> list[str]:
    """Return the index words of `text` in order, stop words left out."""
    return list(_words(text))


def cjk_share(text: str) -> float:
    """Return the share of Chinese characters among the letters of `text`."""
    letters = sum(character.isalpha() for character in text)
    return len(_CJK.findall(text)) / letters if letters else 0.0


def has_cjk(text: str) -> bool:
    return _CJK.search(text) is not None


def _words(text: str) -> Iterator[str]:
    for match in _PIECE.finditer(unicodedata.normalize("NFKC", text)):
        piece = match.group()
        match match.lastgroup:
            case "cjk":
                yield from _chinese(piece)
            case "name":
                yield from _name(piece)
            case "option":
                yield piece.lower()
                yield from _parts(piece)
            case "number":
                yield piece.lower()
            case _:
                yield piece


def _chinese(run: str) -> Iterator[str]:
    words: set[str] = set()
    for word in _cut(run):
        if word not in _CHINESE_STOPWORDS:
            words.add(word)
            yield word
    for first, second in pairwise(run):
        pair = first + second
        if pair in words or pair in _CHINESE_STOPWORDS:
            continue
        if first in _CHINESE_STOPWORDS or second in _CHINESE_STOPWORDS:
            continue
        yield pair


def _cut(run: str) -> list[str]:
    import rjieba

    return list(rjieba.cut_for_search(run))


def chinese_words(run: str) -> list[str]:
    """Return jieba's plain cut of a Chinese text, in order and without overlap."""
    import rjieba

    return list(rjieba.cut(run))


def is_dictionary_word(word: str) -> bool:
    """Say whether jieba's dictionary has the word."""
    import rjieba

    return bool(rjieba.has_word(word))


@lru_cache(maxsize=65_536)
def _name_words(piece: str) -> tuple[str, ...]:
    lower = piece.lower()
    parts = tuple(_parts(piece))
    plain = piece.isalpha() and (piece.islower() or piece[1:].islower() or piece.isupper())
    if plain:
        if lower in ENGLISH_STOPWORDS and not (piece.isupper() and len(piece) > 1):
            return ()
        return (stem(lower),)
    return (lower, *(part for part in parts if part != lower))


def _name(piece: str) -> Iterator[str]:
    yield from _name_words(piece)


def _parts(piece: str) -> Iterator[str]:
    for part in _PART.findall(piece):
        lower = part.lower()
        if lower not in ENGLISH_STOPWORDS and (
            len(lower) > 1 or not lower.isalpha() or not lower.isascii()
        ):
            yield stem(lower)
