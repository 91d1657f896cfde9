"""Questions about a sentence, in other words than its own, in its language or the other one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from serving.demo_model.training.lexicon import HAN, STOPWORDS, WORD, Lexicon

_IDENTIFIER = re.compile(r"`([^`\n]{2,30})`|\b([A-Za-z]+(?:[_.:]+[A-Za-z0-9]+)+|[a-z]+[A-Z]\w+)\b")
_CLAUSE_ZH = re.compile(r"[，。；：！？、（）“”]+")
_CLAUSE_EN = re.compile(r"[,;:.!?()]+\s*")
_FUNCTION_ZH = set(
    "的了和与或是在有也都就还又被把对从到于而但并其之个这那吗呢为让给用以由等很太更最只再才却着过地得它不没会要能可时后前里中上下"
)

_ABOUT_EN = (
    "What is said about {x}?", "How does {x} work?", "Tell me about {x}.", "What about {x}?",
    "Can you explain {x}?", "What do I need to know about {x}?", "I do not understand {x}.",
    "What role does {x} play?", "Where does {x} come in?", "Why is {x} needed?",
    "What happens with {x}?", "How do I deal with {x}?", "Is there a rule for {x}?",
    "What does the course say on {x}?", "Which remedy exists for {x}?", "{x}: how is it done?",
    "When does {x} matter?", "Please summarise {x}.", "What should I do about {x}?",
)  # fmt: skip
_STORY_EN = (
    "{x}. Why is that?", "{x}. What did I do wrong?", "{x}; what is the reason?", "How come {x}?",
    "Why does it happen that {x}?", "What if {x}?", "Is it true that {x}?", "{x}. What can I do?",
    "What does it mean when {x}?", "How can it be that {x}?", "I noticed that {x}. Is that right?",
    "{x}. Which step did I forget?", "When I work on this, {x}. How is that repaired?",
    "Somebody told me that {x}. Where does that come from?", "How is it ensured that {x}?",
    "What do I do so that {x}?", "Which rule says that {x}?", "In which case {x}?",
)  # fmt: skip
_ABOUT_ZH = (
    "{x}是什么？", "{x}是怎么回事？", "{x}怎么办？", "请讲讲{x}。", "{x}有什么用？",
    "为什么要{x}？",
    "{x}该怎么处理？", "怎样理解{x}？", "关于{x}有什么规定？", "{x}要注意什么？", "如何{x}？",
    "我不明白{x}。", "{x}会怎样？", "{x}在哪里讲到？", "怎么{x}才对？", "什么时候{x}？",
    "能不能{x}？",
    "{x}的原因是什么？", "{x}应该怎么做？", "{x}，有什么办法？", "{x}是指什么？", "哪种情况要{x}？",
)  # fmt: skip
_STORY_ZH = (
    "{x}，这是为什么？", "{x}，是哪里做错了？", "{x}，怎么解决？", "为什么{x}？", "{x}怎么办？",
    "如果{x}，会怎么样？", "{x}，对吗？", "{x}，应该怎么处理？", "{x}，有什么办法吗？",
    "怎样才能{x}？",
    "我发现{x}，正常吗？", "{x}，是不是漏了哪一步？", "什么情况下{x}？", "{x}是怎么做到的？",
    "{x}要满足什么条件？", "听说{x}，是真的吗？", "{x}，该选哪一种？", "想让{x}，要做什么？",
)  # fmt: skip
_GLUE_ZH = ("的", "和", "、", "时", "里的", "之后", "，", "与", "中", "对", "用", "")


def identifiers(sentence: str) -> list[str]:
    """Return names of code in a sentence: what stands in back-quotes or looks like a name."""
    return [a or b for a, b in _IDENTIFIER.findall(sentence)]


def ask_english(
    sentence: str,
    rng: Random,
    lexicon: Lexicon,
    weight: dict[str, float],
    swap: float,
    about: float = 0.45,
) -> str:
    """Return an English question about an English sentence.

    `swap` says how often words change, `about` how often only a few of them are kept.
    """
    if rng.random() < about:
        return _about_english(sentence, rng, lexicon, weight, swap)
    clauses = [c for c in _CLAUSE_EN.split(sentence) if len(c.split()) >= 3] or [sentence]
    first = rng.randrange(len(clauses))
    words = " ".join(clauses[first : first + rng.randint(1, 2)]).split()
    if len(words) > 14:
        start = rng.randrange(len(words) - 9)
        words = words[start : start + rng.randint(8, 14)]
    told = " ".join(reworded(words, rng, lexicon, swap, drop=0.12))
    told = told.strip(" .,;:`") or sentence
    if rng.random() < 0.3:
        told = _as_student(told)
    template = rng.choice(_STORY_EN)
    if not template.startswith("{x}") and told.split()[0] in ("The", "A", "An", "This", "It", "If"):
        told = told[0].lower() + told[1:]
    question = template.format(x=told)
    return question[0].upper() + question[1:]


def _as_student(told: str) -> str:
    told = re.sub(r"\b[Tt]he (\w+)", r"my \1", told, count=1)
    return re.sub(r"\b(must|should) not\b", "may not", told)


def _about_english(
    sentence: str, rng: Random, lexicon: Lexicon, weight: dict[str, float], swap: float
) -> str:
    words = [w for w in WORD.findall(sentence) if len(w) > 2 and w.lower() not in STOPWORDS]
    words = list(dict.fromkeys(words))
    if not words:
        return rng.choice(_ABOUT_EN).format(x=sentence.rstrip("."))
    rank = {w: weight.get(w.lower(), 6.0) * rng.uniform(0.6, 1.4) for w in words}
    best = sorted(words, key=lambda w: -rank[w])[: rng.randint(2, 5)]
    kept = [w for w in words if w in best]
    kept = [lexicon.english(w, rng) if rng.random() < swap else w for w in kept]
    for name in identifiers(sentence)[:1]:
        if rng.random() < 0.5:
            kept.append(name)
    if len(kept) == 1:
        x = kept[0]
    else:
        x = " ".join(kept[:-1]) + rng.choice((" and ", " ", " for ", " in ", " of ")) + kept[-1]
    return rng.choice(_ABOUT_EN).format(x=x)


def reworded(
    words: Sequence[str], rng: Random, lexicon: Lexicon, swap: float, drop: float
) -> list[str]:
    """Return the words with some of them put otherwise and some left out."""
    made = []
    for word in words:
        bare = word.strip("`'\",.;:()")
        if rng.random() < drop and len(words) > 4:
            continue
        if bare.isalpha() and bare.lower() not in STOPWORDS and rng.random() < swap:
            made.append(lexicon.english(bare, rng))
        else:
            made.append(word)
    return made


def ask_chinese(sentence: str, rng: Random, lexicon: Lexicon, swap: float) -> str:
    """Return a Chinese question about a Chinese sentence."""
    clauses = [c for c in _CLAUSE_ZH.split(sentence) if len(c) >= 4] or [sentence.strip("。")]
    if rng.random() < 0.45:
        pieces = _pieces(sentence, rng, lexicon)
        count = min(len(pieces), rng.randint(2, 4))
        places = sorted(rng.sample(range(len(pieces)), count))
        chosen = [pieces[p] for p in places]
        chosen = [lexicon.chinese(p, rng) if rng.random() < swap else p for p in chosen]
        x = chosen[0] if chosen else clauses[0]
        for piece in chosen[1:]:
            x += rng.choice(_GLUE_ZH) + piece
        return rng.choice(_ABOUT_ZH).format(x=x)
    first = rng.randrange(len(clauses))
    told = "，".join(clauses[first : first + rng.randint(1, 2)])
    told = re.sub(r"^(如果|只要|因为|由于|所以|因此|但是|不过|注意|另外|此外|一般来说)", "", told)
    words = [
        lexicon.chinese(w, rng) if rng.random() < swap else w
        for w in lexicon.chinese_words(told)
        if not (len(w) == 1 and w in _FUNCTION_ZH and rng.random() < 0.25)
    ]
    if len(words) > 8 and rng.random() < 0.4:
        gone = rng.randrange(len(words) - 2)
        del words[gone : gone + 2]
    return rng.choice(_STORY_ZH).format(x=_spaced(words)[:60])


def ask_about(words: Sequence[str], rng: Random, chinese: bool) -> str:
    """Return a question that names just these words."""
    if chinese:
        x = words[0]
        for word in words[1:]:
            x += rng.choice(_GLUE_ZH) + word
        return rng.choice(_ABOUT_ZH).format(x=x)
    question = rng.choice(_ABOUT_EN).format(x=" ".join(words))
    return question[0].upper() + question[1:]


def _pieces(sentence: str, rng: Random, lexicon: Lexicon) -> list[str]:
    """Known words, names in Latin letters, and runs of characters between function words."""
    found: list[str] = []
    run = ""
    for word in lexicon.chinese_words(sentence):
        if len(word) == 1 and HAN.match(word) and word not in _FUNCTION_ZH:
            run += word
            if len(run) < 4:
                continue
        if len(run) > 1:
            found.append(run)
        run = ""
        if len(word) > 1:
            found.append(word)
    if len(run) > 1:
        found.append(run)
    return found or [sentence[:12]]


def _spaced(words: Sequence[str]) -> str:
    text = ""
    for word in words:
        latin = bool(re.match(r"[A-Za-z]", word))
        text += (" " if latin and text and HAN.match(text[-1]) else "") + word
    return text


def ask_across(sentence: str, rng: Random, lexicon: Lexicon, chinese: bool) -> str | None:
    """Return a question in the other language, `chinese` or English; None if too little is known.

    It joins translations of words of the sentence, with names of code as they are.
    """
    if chinese:
        known = [z for _, z in lexicon.translated(sentence, rng)]
    else:
        known = [e for _, e in lexicon.in_english(sentence, rng)]
    known = list(dict.fromkeys(known))
    if len(known) < 3:
        return None
    count = min(len(known), rng.randint(3, 6))
    start = rng.randrange(len(known) - count + 1)
    chosen = known[start : start + count]
    names = identifiers(sentence)
    if names and rng.random() < 0.5:
        chosen.insert(rng.randrange(len(chosen) + 1), rng.choice(names))
    if chinese:
        x = chosen[0]
        for word in chosen[1:]:
            x += rng.choice(_GLUE_ZH) + word
        return rng.choice(_ABOUT_ZH + _STORY_ZH).format(x=x)
    question = rng.choice(_ABOUT_EN + _STORY_EN).format(x=" ".join(chosen))
    return question[0].upper() + question[1:]
