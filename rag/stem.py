"""A light stemmer for English technical prose, and the words too common to search for.

It joins the forms that a question and a handout differ in (parse, parses, parsed, parsing;
allocate, allocation, allocator) and leaves short words alone. The result need not be a word.
"""

from __future__ import annotations

from functools import lru_cache

_STOPWORDS = """
a an the and or but nor so if then than that this these those there here it its it's is are
was were be been being am do does did doing done have has had having can could will would shall
should may might must of in on at by for from to with without into onto over under about as up out
off not no yes i me my mine we us our ours you your yours he him his she her hers they them their
theirs what which who whom whose when where why how all any each both some such only own same too
very just also one's let get gets got go goes going make makes made please tell explain say says
said know mean means actually really like s t re ve ll d m don doesn didn isn aren wasn won couldn
wouldn shouldn hasn haven hadn etc
"""
ENGLISH_STOPWORDS = frozenset(_STOPWORDS.split())
_VOWELS = frozenset("aeiouy")
#: Endings tried in this order; what stays must have at least the given number of letters.
_ENDINGS: tuple[tuple[str, str, int], ...] = (
    ("izations", "iz", 3), ("ization", "iz", 3), ("isation", "iz", 3), ("izers", "iz", 3),
    ("izer", "iz", 3), ("izing", "iz", 3), ("ized", "iz", 3), ("izes", "iz", 3), ("ize", "iz", 3),
    ("ising", "iz", 4), ("ised", "iz", 4), ("ise", "iz", 4),
    ("ations", "at", 3), ("ation", "at", 3), ("ators", "at", 3), ("ator", "at", 3),
    ("ating", "at", 3), ("ated", "at", 3), ("ates", "at", 3), ("ate", "at", 3),
    ("ative", "at", 3), ("ctions", "ct", 2), ("ction", "ct", 2), ("ctors", "ct", 3),
    ("ctor", "ct", 3), ("ctive", "ct", 3), ("sions", "s", 4), ("sion", "s", 4),
    ("tions", "t", 4), ("tion", "t", 4), ("iveness", "iv", 3), ("fulness", "ful", 3),
    ("ousness", "ous", 3), ("nesses", "", 4), ("ness", "", 4), ("ments", "", 4), ("ment", "", 4),
    ("ically", "ic", 3), ("ical", "ic", 3), ("ically", "ic", 3), ("ably", "abl", 3),
    ("able", "abl", 3), ("ibly", "ibl", 3), ("ible", "ibl", 3), ("lessly", "less", 3),
    ("fully", "ful", 3), ("ously", "ous", 3), ("ively", "iv", 3), ("ities", "", 4), ("ity", "", 4),
    ("ly", "", 4),
)  # fmt: skip


@lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """Return the stem of a lower-case word; anything but plain English letters stays as it is."""
    if len(word) <= 3 or not (word.isascii() and word.isalpha()):
        return word
    word = _singular(word)
    for ending, rest, least in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= least:
            return word[: len(word) - len(ending)] + rest
    return _plain_verb(word)


def _singular(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "zes")) and len(word) > 5:
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _plain_verb(word: str) -> str:
    for ending in ("ing", "ed", "ers", "er", "or"):
        rest = word[: len(word) - len(ending)]
        if word.endswith(ending) and len(rest) >= 3 and any(c in _VOWELS for c in rest):
            if ending in ("er", "or", "ers") and len(rest) < 4:
                break
            if len(rest) > 3 and rest[-1] == rest[-2] and rest[-1] not in "lsz":
                rest = rest[:-1]
            word = rest
            break
    if word.endswith("e") and len(word) > 4:
        word = word[:-1]
    elif word.endswith("y") and len(word) > 3 and word[-2] not in _VOWELS:
        word = word[:-1] + "i"
    return word
