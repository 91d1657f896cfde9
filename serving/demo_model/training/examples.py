"""Training examples: chats whose answers are sentences of the right passage, or a refusal."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from serving.demo_model.training import frames, prompts
from serving.demo_model.training.corpus import (
    Corpus,
    Passage,
    Search,
    content,
    make_passage,
)
from serving.demo_model.training.dialogue import talk
from serving.demo_model.training.lectures import Lecture, lectures
from serving.demo_model.training.lexicon import (
    HAN,
    STOPWORDS,
    WORD,
    Lexicon,
    base_forms,
    common_characters,
)
from serving.demo_model.training.prompts import Turn
from serving.demo_model.training.questions import (
    ask_about,
    ask_across,
    ask_chinese,
    ask_english,
    reworded,
)
from serving.demo_model.training.tasks import KINDS, make_task

#: How often an example asks about lecture notes.
LECTURES = 0.5
#: How often the right passage is missing, so that the answer is a refusal.
_MISSING = 0.33
#: While choosing is learnt: how often wrong passages are any.
_EASY = 0.75
#: How often a further question that nothing shown answers is one on something else altogether.
_FAR = 0.4
#: Passages of a prompt; a few long prompts, so that all positions are met. Then of an easy one.
_COUNTS = (1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 6, 8) * 3 + (12, 16)
_EASY_COUNTS = (1, 2, 2, 3, 3, 4, 4)
#: Further questions on the same passages: so a prompt that is read once teaches several choices.
_FURTHER_LECTURES = (0, 4, 8, 10, 12)
_FURTHER_DOCUMENTS = (0, 0, 2, 3, 4)
_COURSES = (
    "编译原理", "操作系统", "计算机网络", "数据库系统", "软件工程", "数据结构", "机器学习导论",
    "Operating Systems", "Computer Networks", "Databases", "Software Engineering", "Algorithms",
    "Programming in Practice", "Compilers", "Machine Learning", "Web Development", "System Tools",
)  # fmt: skip
_MOST_TERMS = 12
#: How often a question on a document comes with words that are of no matter, how often its
#: passages' words are others.
_ASIDES = 0.35
_RENAMED = 0.4
#: How often passages have lines of a width, as files and PDFs have them, and which widths.
_BROKEN = 0.3
_WIDTHS = (44, 60, 72, 78, 80, 100)
_ASIDE_EN = (
    "While working on {n}: {q}", "I use {n}. {q}", "{q} I already tried {n}.",
    "My task is {n}. {q}",
    "After reading of {n} I wonder: {q}", "A friend has {n}. {q}", "{q} It is about {n}.",
    "This is not {n}, but {q}",
)  # fmt: skip
_ASIDE_ZH = (
    "我在做{n}，{q}", "学{n}的时候，{q}", "{q}我用的是{n}。", "同学在弄{n}，{q}",
    "{q}是不是和{n}有关？",
    "先不说{n}，{q}",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """A text in pieces: what is only read, and what is to be learnt (`answer`); `more` follows."""

    read: str
    answer: str
    more: tuple[Example, ...] = ()

    def pieces(self) -> list[tuple[str, str]]:
        """Return all that is read and answered, in order."""
        return [(self.read, self.answer), *(piece for e in self.more for piece in e.pieces())]

    def text(self) -> str:
        return "".join(read + answer for read, answer in self.pieces())


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question with its passage; `text` is the answer, None if the passage lacks it."""

    question: str
    chinese: bool
    target: Passage
    text: str | None
    wrong: list[Passage]


#: Makes a further question on passages that are shown: (question, in Chinese, number of the passage
#: from 0, its text), with -1 if none of them answers it. None if it finds no question.
_Follow = Callable[[Random, Sequence[Passage]], tuple[str, bool, int, str] | None]


class Maker:
    """Makes examples from a corpus; the same random numbers give the same example."""

    def __init__(
        self, corpus: Corpus, held_out: bool = False, lectures_share: float = LECTURES
    ) -> None:
        """With `held_out`, documents are those that other makers never show, to measure with.
        `lectures_share` of the examples, but for easy ones, ask about lecture notes."""
        #: The first examples: most by rule, one question each, mostly beside passages of other
        #: words. With hard ones only, nothing but chance is learnt for a long time.
        self.easy = False
        self.corpus = corpus
        self.lexicon = Lexicon(corpus.synonyms, corpus.definitions)
        self.search = Search(corpus.passages)
        #: A file of notes is like a course, in which wrong sections are searched for: its sections
        #: and those of them that are asked about. With `held_out`, wrong ones may be any.
        self._courses: list[tuple[Search, list[Lecture]]] = []
        self._lectures: dict[Passage, Lecture] = {}
        for its in _by_course(lectures()).values():
            asked = [n for n in its if n.asked and _is_held_out(n.passage) == held_out]
            if asked:
                shown = its if held_out else [n for n in its if not _is_held_out(n.passage)]
                self._courses.append((Search([n.passage for n in shown]), asked))
                self._lectures |= {n.passage: n for n in shown}
        self._sizes = [len(asked) for _, asked in self._courses]
        self._characters = common_characters()
        rare = math.log(max(len(corpus.passages), 2) / 20)
        words = sorted(w for w in self.search.weight if w.isalpha() and w.isascii())
        self._words = [w for w in words if self.search.weight[w] < rare] or words
        kept = [_is_held_out(p) == held_out for p in corpus.passages]
        #: Numbers of the passages that may be shown, and of the pairs between such.
        self._numbers = [n for n, mine in enumerate(kept) if mine] or list(range(len(kept)))
        self._allowed = frozenset(self._numbers)
        self._pairs: list[int] = []
        self._pairs_across: list[int] = []
        if (near := corpus.near) is not None:
            asked, answers = near.sentences[:, 0].tolist(), near.sentences[:, 2].tolist()
            self._pairs = [n for n, (a, b) in enumerate(zip(asked, answers, strict=True))
                           if a in self._allowed and b in self._allowed]  # fmt: skip
            across = near.across[:, 1].tolist()
            self._pairs_across = [n for n, a in enumerate(across) if a in self._allowed]
        # A question made by rule has most of its words from its answer, which teaches to count
        # words: so more are made from another sentence that says nearly the same.
        kinds: list[tuple[float, Callable[[Random], Example]]] = [
            (0.16, self._documentation),
            (0.14, self._documentation_in_chinese),
            (0.28, self._near if self._pairs else self._documentation),
            (0.10, self._facts),
            (0.04, self._messages if corpus.runs else self._facts),
            (0.06, self._random_words),
            (0.15, self._task),
            (0.03, self._talk),
            (0.04, self._dictionary),
        ]
        rest = 1 - lectures_share
        self._kinds = [(lectures_share, self._lecture), *((rest * s, k) for s, k in kinds)]
        self._easy_kinds: list[tuple[float, Callable[[Random], Example]]] = [
            (0.42, self._documentation),
            (0.12, self._documentation_in_chinese),
            (0.10, self._facts),
            (0.10, self._random_words),
            (0.08, self._lecture),
            (0.14, self._task),
            (0.04, self._dictionary),
        ]

    def example(self, rng: Random) -> Example:
        kinds = self._easy_kinds if self.easy else self._kinds
        makers = [make for _, make in kinds]
        return rng.choices(makers, [share for share, _ in kinds])[0](rng)

    def on_documents(self) -> dict[str, Callable[[Random], Example]]:
        """Return the makers of questions on documents, by name."""
        found: dict[str, Callable[[Random], Example]] = {
            "documents": self._documentation,
            "documents zh": self._documentation_in_chinese,
            "lectures": partial(self._lecture, varied=False),
        }
        return found | ({"near": self._near_sentences} if self._pairs else {})

    # Documentation: English passages, with other passages of the same documents as wrong ones.

    def _documentation(self, rng: Random) -> Example:
        return self._about_documents(rng, chinese=False)

    def _documentation_in_chinese(self, rng: Random) -> Example:
        return self._about_documents(rng, chinese=True)

    def _asked_of_documents(self, rng: Random, chinese: bool) -> tuple[int, int, str]:
        """Return the number of a passage, the place of a sentence in it, and a question on it."""
        search = self.search
        while True:
            number = rng.choice(self._numbers)
            target = search.passages[number]
            if not chinese and rng.random() < 0.06 and len(target.heading.split()) > 2:
                return number, 0, ask_english(target.heading, rng, self.lexicon, search.weight, 0.3)
            found = self._asked_of(rng, target, chinese)
            if found is not None:
                return number, *found

    def _asked_of(self, rng: Random, passage: Passage, chinese: bool) -> tuple[int, str] | None:
        """Return the place of a sentence in a passage and a question on it, if one can be made."""
        place = rng.randrange(len(passage.spans))
        sentence = passage.sentence(place)
        if len(sentence) < 30:
            return None
        if chinese:
            question = ask_across(sentence, rng, self.lexicon, chinese=True)
            return None if question is None else (place, question)
        swap = rng.choice((0.0, 0.2) if self.easy else (0.0, 0.2, 0.4, 0.5, 0.6))
        return place, ask_english(sentence, rng, self.lexicon, self.search.weight, swap)

    def _further_of_documents(
        self, rng: Random, shown: Sequence[Passage]
    ) -> tuple[str, bool, int, str] | None:
        number = rng.randrange(len(shown))
        passage = shown[number]
        if rng.random() < _MISSING:  # of the same document or any other, but not shown
            numbers = self.search.groups.get(passage.group, [])
            if rng.random() < _FAR:
                numbers = rng.choices(self._numbers, k=4)
            names = {(p.title, p.heading) for p in shown}
            others = [self.search.passages[n] for n in numbers]
            absent = [p for p in others if (p.title, p.heading) not in names]
            if not absent:
                return None
            number, passage = -1, rng.choice(absent)
        chinese = rng.random() < 0.4
        found = self._asked_of(rng, passage, chinese)
        if found is None:
            return None
        return found[1], chinese, number, passage.window(found[0])

    def _about_documents(self, rng: Random, chinese: bool) -> Example:
        search = self.search
        number, place, question = self._asked_of_documents(rng, chinese)
        target = search.passages[number]
        sentence = target.sentence(place)
        last = place + 1 == len(target.spans) or (
            target.paragraph[place + 1] != target.paragraph[place]
        )
        if not chinese and not last and len(target.spans) > 2 and rng.random() < 0.15:
            # The sentence asked about is gone: what followed it has to be found by its subject.
            target = target.without(place)
        if target.code and rng.random() < 0.5:
            target = replace(target, code="")
        text = target.window(place)
        if target.code and rng.random() < 0.15:
            wish = rng.choice((" Show the code.", " Give the example.", " I need the code for it."))
            question += " 请给出代码。" if chinese else wish
            text = f"\n```\n{target.code}\n```"
        if not self.easy and rng.random() < _ASIDES:
            question = self._with_aside(rng, question, chinese)
        words = content(question if not chinese else sentence)
        wrong = self._other_documents(rng, words, number)
        asked = _Asked(question, chinese, target, text, wrong)
        return self._put(
            rng,
            asked,
            renamed=not (chinese or self.easy) and rng.random() < _RENAMED,
            follow=self._further_of_documents,
            further=rng.choice(_FURTHER_DOCUMENTS),
        )

    def _with_aside(self, rng: Random, question: str, chinese: bool) -> str:
        """Return the question with words round it that the right passage need not have."""
        if chinese:
            aside = "和".join(
                rng.choice(self.lexicon.terms)[0][0] for _ in range(rng.randint(1, 2))
            )
            return rng.choice(_ASIDE_ZH).format(q=question, n=aside)
        other = self.search.passages[rng.choice(self._numbers)]
        words = WORD.findall(other.sentence(rng.randrange(len(other.spans))))
        size = rng.randint(2, 6)
        first = rng.randrange(max(1, len(words) - size))
        aside = " ".join(words[first : first + size]).lower()
        return rng.choice(_ASIDE_EN).format(q=question, n=aside)

    def _other_documents(
        self, rng: Random, words: frozenset[str], number: int, avoid: Collection[int] = ()
    ) -> list[Passage]:
        """Return wrong passages beside `number`: near it, of its document, or with its words."""
        search = self.search
        most = max(0.8 * search.overlap(words, number), 0.2)
        hard = search.rank(words, rng, 14)
        same = search.groups[search.passages[number].group]
        near = [n for n in range(number - 4, number + 5) if 0 <= n < len(search.passages)]
        others = [*hard, *rng.sample(same, min(3, len(same))), *rng.sample(near, 3)]
        if rng.random() < (_EASY if self.easy else 0.25):
            others = rng.choices(self._numbers, k=8)
        rng.shuffle(others)
        return [
            search.passages[other]
            for other in dict.fromkeys([*others, rng.choice(self._numbers)])
            if other != number
            and other in self._allowed
            and other not in avoid
            and (avoid or search.overlap(words, other) < most)
        ]

    # Sentences that say nearly the same: the question is made from one, the other answers it.

    def _near(self, rng: Random) -> Example:
        if self.corpus.near is not None and len(self.corpus.near.messages) and rng.random() < 0.25:
            return self._messages(rng, alike=True)
        return self._near_sentences(rng)

    def _near_sentences(self, rng: Random) -> Example:
        near = self.corpus.near
        assert near is not None
        if rng.random() < 0.2 and self._pairs_across:
            first, number, place = near.across[rng.choice(self._pairs_across)].tolist()
            asked, chinese = self.corpus.pairs[first], True
            question = ask_chinese(asked[1], rng, self.lexicon, 0.3)
            avoid: list[int] = []
            words = content(asked[0])
        else:
            row = rng.choice(self._pairs)
            source, where, number, place = near.sentences[row].tolist()
            sentence = self.search.passages[source].sentence(where)
            chinese = rng.random() < 0.15
            crossed = ask_across(sentence, rng, self.lexicon, chinese=True) if chinese else None
            chinese = crossed is not None
            question = crossed or ask_english(
                sentence, rng, self.lexicon, self.search.weight, rng.choice((0.0, 0.2, 0.4)), 0.2
            )
            avoid = [source, number, *near.beside[row].tolist()]
            words = content(sentence)
        target = self.search.passages[number]
        wrong = self._other_documents(rng, words, number, avoid)
        return self._put(rng, _Asked(question, chinese, target, target.window(place), wrong))

    # Invented facts, in both languages.

    def _facts(self, rng: Random) -> Example:
        text_chinese = rng.random() < 0.65
        ask_in_chinese = text_chinese if rng.random() < 0.7 else not text_chinese
        topic = rng.choice(self.lexicon.terms)
        target, facts = frames.passage(rng, self.lexicon, text_chinese, topic)
        place = rng.randrange(len(facts))
        if ask_in_chinese == text_chinese and rng.random() < 0.3:
            sentence = target.sentence(place)
            question = (
                ask_chinese(sentence, rng, self.lexicon, 0.5)
                if text_chinese
                else ask_english(sentence, rng, self.lexicon, self.search.weight, 0.3)
            )
        else:
            question = facts[place].ask(rng, ask_in_chinese)
        wrong = []
        for _ in range(8):
            kind = rng.random()
            other = topic if kind < 0.3 else rng.choice(self.lexicon.terms)
            made, told = frames.passage(rng, self.lexicon, rng.random() < 0.8, other)
            if all(f.frame is not facts[place].frame or other is not topic for f in told):
                wrong.append(made)
        asked = _Asked(question, ask_in_chinese, target, target.window(place, 3), wrong)
        return self._put(rng, asked)

    # Own lecture notes with questions as a student would ask them.

    def _lecture(self, rng: Random, varied: bool = True) -> Example:
        """Ask about a section, beside those that a search for the question's words finds in the
        same course, or others of its document; then about any of these.

        `varied`: some words of the questions are others, some questions are made by rule, a
        sentence of a section may be missing, and the wrong sections may be easier ones. Else there
        is one question and four sections, as the platform may show them.
        """
        notes, asked_about = rng.choices(self._courses, self._sizes)[0]
        lecture = rng.choice(asked_about)
        number, question = rng.choice(lecture.asked)
        chinese = bool(HAN.search(question))
        words = content(question)
        if chinese and not lecture.passage.chinese:
            words |= content(" ".join(name for _, name in self.lexicon.names(question)))
        others = notes.rank(words, rng, 9)
        beside = notes.groups[lecture.passage.group]
        if not varied:
            others = others[:5]
        elif self.easy and rng.random() < _EASY:
            others = rng.choices(range(len(notes.passages)), k=9)
        elif rng.random() < 0.4:
            others = [*rng.sample(beside, min(5, len(beside))),
                      *rng.sample(others, min(3, len(others))),
                      *rng.choices(range(len(notes.passages)), k=2)]  # fmt: skip
        else:
            others = others[: rng.choice((4, 6, 9))]
        passages = [notes.passages[n] for n in dict.fromkeys(others)]
        sections = [self._lectures[p] for p in passages if p != lecture.passage]
        if varied:
            lecture, number = self._shortened(rng, lecture, number)
            sections = [self._shortened(rng, section)[0] for section in sections]
            question, chinese, number = self._varied(rng, lecture.passage, question, number)
        target = lecture.passage
        wrong = [section.passage for section in sections]
        if len(wrong) < 3 or rng.random() < 0.1:
            wrong.append(frames.passage(rng, self.lexicon, target.chinese)[0])
        asked = _Asked(question, chinese, target, target.window(number), wrong)
        if not varied:
            return self._put(rng, asked, count=4)
        own = {section.passage: section for section in [lecture, *sections]}
        told = {question}

        def further(rng: Random, shown: Sequence[Passage]) -> tuple[str, bool, int, str] | None:
            names = {(p.title, p.heading) for p in shown}
            if rng.random() < _MISSING:
                # A section of the same document that is not shown, or of any other course: what
                # is shown does not answer.
                absent = [p for n in beside if (p := notes.passages[n]) not in own]
                absent = [p for p in absent if (p.title, p.heading) not in names]
                sources = [(-1, self._lectures[p]) for p in absent]
                if rng.random() < _FAR and (courses := [c for c in self._courses if c[0] != notes]):
                    sources = [(-1, rng.choice(rng.choice(courses)[1]))]
            else:
                sources = [(n, own[p]) for n, p in enumerate(shown) if p in own]
            sources = [(n, section) for n, section in sources if section.asked]
            if not sources:
                return None
            shown_as, section = rng.choice(sources)
            place, asked = rng.choice(section.asked)
            if asked in told:
                return None
            told.add(asked)
            asked, chinese, place = self._varied(rng, section.passage, asked, place)
            return asked, chinese, shown_as, section.passage.window(place)

        return self._put(rng, asked, follow=further, further=rng.choice(_FURTHER_LECTURES))

    def _shortened(self, rng: Random, lecture: Lecture, kept: int = -1) -> tuple[Lecture, int]:
        """Leave out a sentence, at times, but not number `kept`; return its new number too."""
        count = len(lecture.passage.spans)
        if count < 3 or rng.random() > 0.4:
            return lecture, kept
        gone = rng.choice([n for n in range(count) if n != kept])
        asked = tuple((n - (n > gone), q) for n, q in lecture.asked if n != gone)
        return Lecture(lecture.passage.without(gone), asked), kept - (gone < kept)

    def _varied(
        self, rng: Random, passage: Passage, question: str, number: int
    ) -> tuple[str, bool, int]:
        """Return a question as it is, in other words, or one made by rule; its language, place."""
        chinese = bool(HAN.search(question))
        if rng.random() < 0.1:
            chinese = passage.chinese
            number = rng.randrange(len(passage.spans))
            sentence = passage.sentence(number)
            question = (
                ask_chinese(sentence, rng, self.lexicon, 0.5)
                if chinese
                else ask_english(sentence, rng, self.lexicon, self.search.weight, 0.4)
            )
        elif rng.random() < 0.5:
            question = self._in_other_words(rng, question, chinese)
        return question, chinese, number

    def _in_other_words(self, rng: Random, question: str, chinese: bool) -> str:
        if not chinese:
            return " ".join(reworded(question.split(), rng, self.lexicon, 0.2, 0.05))
        return "".join(
            self.lexicon.chinese(w, rng) if len(w) > 1 and rng.random() < 0.25 else w
            for w in self.lexicon.chinese_words(question)
        )

    # Random words: nothing but their identity tells which passage is meant. Every token of the
    # vocabulary is looked for in this way, also those that other texts hardly use.

    def _random_words(self, rng: Random) -> Example:
        chinese = rng.random() < 0.6

        def word() -> str:
            if rng.random() < 0.4:
                return rng.choice(rng.choice(self.lexicon.terms)[0 if chinese else 1])
            if chinese:
                return "".join(rng.choices(self._characters, k=2))
            return rng.choice(self._words)

        def passage() -> tuple[Passage, list[list[str]]]:
            rows = [[word() for _ in range(rng.randint(3, 9))] for _ in range(rng.randint(1, 4))]
            if chinese:
                body = "".join("".join(row) + "。" for row in rows)
            else:
                body = " ".join(" ".join(row).capitalize() + "." for row in rows)
            title = word()
            return make_passage("", title, title, [body]), rows

        target, rows = passage()
        while len(target.spans) != len(rows):  # a word that ends a sentence was among them
            target, rows = passage()
        place = rng.randrange(len(rows))
        words = rng.sample(rows[place], min(len(rows[place]), rng.randint(2, 4)))
        question = ask_about(words, rng, chinese)
        wrong = [passage()[0] for _ in range(8)]
        asked = _Asked(question, chinese, target, target.window(place, 3), wrong)
        return self._put(rng, asked)

    # Messages of programs with their translations: short Chinese sentences.

    def _messages(self, rng: Random, alike: bool = False) -> Example:
        """Ask about a message; `alike`: in the words of another one that says nearly the same."""
        corpus = self.corpus
        first, end = rng.choices(corpus.runs, [b - a for a, b in corpus.runs])[0]
        asked_of: tuple[str, str] | None = None
        answer = -1
        if alike and corpus.near is not None:
            other, answer = corpus.near.messages[rng.randrange(len(corpus.near.messages))].tolist()
            asked_of = corpus.pairs[other]
            first, end = next(
                ((a, b) for a, b in corpus.runs if a <= answer < b), (answer, answer + 1)
            )
        text_chinese = rng.random() < 0.75
        ask_in_chinese = rng.random() < 0.8

        def passage(around: int = -1) -> tuple[Passage, list[tuple[str, str]]]:
            start = rng.randrange(first, max(first + 1, end - 6))
            if around >= 0:
                start = max(first, around - rng.randint(0, 4))
            rows = corpus.pairs[start : max(start + rng.randint(2, 6), around + 1)]
            rows = [r for r in rows if r[0] or text_chinese] or [corpus.pairs[first]]
            body = "".join(_ended(z) for _, z in rows)
            if not text_chinese:
                body = " ".join(_ended(e or z) for e, z in rows)
            title = rng.choice(rng.choice(self.lexicon.terms)[0 if text_chinese else 1])
            return make_passage("", title, title, [body]), rows

        target, rows = passage(answer)
        place = rng.randrange(len(target.spans))
        if asked_of is not None:
            told = _ended(corpus.pairs[answer][1 if text_chinese else 0])
            start = target.body.find(told)
            place = next((n for n, (_, e) in enumerate(target.spans) if e > start), 0)
            row = asked_of
        else:
            sentence = target.sentence(place)
            row = next((r for r in rows if sentence[:12] in r[0] or sentence[:12] in r[1]), rows[0])
        if ask_in_chinese:
            question = ask_chinese(row[1], rng, self.lexicon, 0.5)
        else:
            question = ask_english(
                row[0] or "this message", rng, self.lexicon, self.search.weight, 0.3
            )
        own = {*rows, row}
        wrong = [p for p, r in (passage() for _ in range(8)) if not own & set(r)]
        asked = _Asked(question, ask_in_chinese, target, target.window(place, 3), wrong)
        return self._put(rng, asked)

    def _put(
        self,
        rng: Random,
        asked: _Asked,
        renamed: bool = False,
        count: int | None = None,
        follow: _Follow | None = None,
        further: int = 0,
    ) -> Example:
        """Shuffle right and wrong passages into a prompt of `count`; sometimes leave out the right
        one. Up to `further` questions of `follow` come after it, in turns of their own.

        With `renamed`, many of the words are others, the same ones everywhere: such passages
        were never read before, so what is known of the documents by heart does not help.
        """
        count = count or rng.choice(_EASY_COUNTS if self.easy else _COUNTS)
        wrong = list(asked.wrong)
        rng.shuffle(wrong)
        missing = rng.random() < (0.1 if self.easy else _MISSING)
        shown = wrong[: count if missing else count - 1]
        if not missing:
            shown.insert(rng.randint(0, len(shown)), asked.target)
        right = -1 if missing else shown.index(asked.target)
        text, chinese = asked.text, asked.chinese
        if renamed:
            rename = _Renaming(rng, self._words)
            shown = [rename.passage(p) for p in shown]
            asked = replace(asked, question=rename(asked.question))
            text = None if text is None else rename(text)
        terms = self._terms(rng, asked.question, chinese, shown)
        drawn, breaks = shown, list[_LineBreaks]()
        if rng.random() < _BROKEN:
            breaks = [_LineBreaks(p.body, rng.choice(_WIDTHS)) for p in shown]
            drawn = [replace(p, body=b.body) for p, b in zip(shown, breaks, strict=True)]
            text = breaks[right].put(text) if text is not None and right >= 0 else text
        turns = self._before(rng, chinese)
        turns.append(prompts.question_turn(asked.question, drawn, chinese, terms))
        more = []
        for _ in range(0 if self.easy or renamed or follow is None or not shown else further):
            assert follow is not None
            made = follow(rng, shown)
            if made is not None:
                question, in_chinese, number, quoted = made
                quoted = breaks[number].put(quoted) if breaks and number >= 0 else quoted
                names = self._terms(rng, question, in_chinese, shown)
                turn = prompts.further_turn(question, in_chinese, names)
                more.append(_answered([turn], in_chinese, number, quoted))
        first = _answered(turns, chinese, right, text)
        return replace(first, more=tuple(more))

    def _terms(
        self, rng: Random, question: str, chinese: bool, shown: Sequence[Passage]
    ) -> list[tuple[str, str]]:
        if not chinese or all(p.chinese for p in shown) or rng.random() > 0.85:
            return []
        return self.lexicon.names(question)[:_MOST_TERMS]

    def _before(self, rng: Random, chinese: bool) -> list[Turn]:
        """The system text, and at times an earlier question with its answer."""
        turns = [prompts.system(rng.choice(_COURSES), chinese)] if rng.random() < 0.95 else []
        if rng.random() < 0.12:
            earlier = frames.fact(rng, self.lexicon)
            said = prompts.answer_text(rng.randint(1, 8), earlier.write(rng, chinese), chinese)
            if rng.random() < 0.2:
                said = prompts.REFUSAL_ZH if chinese else prompts.REFUSAL_EN
            turns += [("user", earlier.ask(rng, chinese)), ("assistant", said)]
        return turns

    # Tasks, small talk, words.

    def _task(self, rng: Random) -> Example:
        task = make_task(rng.choice((*KINDS, "two_hop", "two_hop")), rng)
        return Example(prompts.chat([("user", task.prompt)]), task.answer + prompts.TURN_END + "\n")

    def _talk(self, rng: Random) -> Example:
        chinese = rng.random() < 0.5
        said, reply = talk(rng, chinese)
        shown = [
            frames.passage(rng, self.lexicon, rng.random() < 0.5)[0]
            for _ in range(rng.choice((0, 2, 3, 4, 6)))
        ]
        if shown and rng.random() < 0.4 and self._numbers:
            shown[0] = self.search.passages[rng.choice(self._numbers)]
        turns = self._before(rng, chinese)
        turns.append(prompts.question_turn(said, shown, chinese))
        if rng.random() < 0.2:
            turns = [("user", said)]
        return Example(prompts.chat(turns), reply + prompts.TURN_END + "\n")

    def _dictionary(self, rng: Random) -> Example:
        """Words with their names in the other language, or with their meanings."""
        lines = []
        for _ in range(rng.randint(8, 30)):
            kind = rng.random()
            if kind < 0.5 or not self.corpus.definitions:
                rows = self.lexicon.terms if kind < 0.35 else self.lexicon.everyday
                chinese, english = rng.choice(rows)
                names = [rng.choice(chinese), rng.choice(english)]
                rng.shuffle(names)
                lines.append(" = ".join(names))
            elif kind < 0.85 or not self.corpus.characters:
                lines.append(": ".join(rng.choice(self.corpus.definitions)))
            else:
                lines.append(" = ".join(rng.choice(self.corpus.characters)))
        return Example("\n".join(lines) + "\n" + prompts.END_OF_TEXT, "")


class _LineBreaks:
    """A text in lines of at most about `width` columns (a Chinese character has two)."""

    def __init__(self, text: str, width: int) -> None:
        self._text = text
        #: A break takes the place of a blank (True), or stands before a character.
        self._breaks: list[tuple[int, bool]] = []
        column = 0
        possible: tuple[int, bool, int] | None = None
        for place, letter in enumerate(text):
            if letter == "\n":
                column, possible = 0, None
                continue
            han = HAN.match(letter) is not None
            if letter == " " and column:
                possible = place, True, column + 1
            elif han and column and HAN.match(text[place - 1]):
                possible = place, False, column
            column += 2 if han else 1
            if column > width and possible is not None:
                self._breaks.append((possible[0], possible[1]))
                column, possible = column - possible[2], None
        self.body = self._between(0, len(text))

    def put(self, part: str) -> str:
        """Return a part of the text with its breaks; what is no part stays as it is."""
        start = self._text.find(part)
        return part if start < 0 else self._between(start, start + len(part))

    def _between(self, start: int, end: int) -> str:
        made, done = [], start
        for place, blank in self._breaks:
            if start < place < end:
                made.append(self._text[done:place])
                done = place + blank
        return "\n".join([*made, self._text[done:end]])


class _Renaming:
    """Puts other words for many of the words, the same one for all forms of a word."""

    def __init__(self, rng: Random, words: Sequence[str]) -> None:
        self._rng = rng
        self._words = words
        self._share = rng.uniform(0.3, 0.9)
        self._names: dict[str, str | None] = {}

    def __call__(self, text: str) -> str:
        return WORD.sub(lambda match: self._name(match[0]), text)

    def passage(self, passage: Passage) -> Passage:
        """Return the passage as it is shown; its spans are those of the former text."""
        heading = self(passage.heading)
        title = heading if passage.title == passage.heading else self(passage.title)
        return replace(passage, title=title, heading=heading, body=self(passage.body),
                       code=self(passage.code))  # fmt: skip

    def _name(self, word: str) -> str:
        low = word.lower()
        if len(word) < 4 or low in STOPWORDS:
            return word
        stem = low
        while (shorter := min(base_forms(stem), key=len)) != stem:
            stem = shorter
        if stem not in self._names:
            rename = self._rng.random() < self._share
            self._names[stem] = self._rng.choice(self._words) if rename else None
        name = self._names[stem]
        if name is None:
            return word
        name += low[len(stem) :] if low.startswith(stem) else ""
        return name.upper() if word.isupper() else name.capitalize() if word[0].isupper() else name


def _answered(turns: Sequence[Turn], chinese: bool, number: int, text: str | None) -> Example:
    """Return turns with their answer from passage `number`, counted from 0; -1: a refusal."""
    if number < 0 or text is None:
        answer = prompts.REFUSAL_ZH if chinese else prompts.REFUSAL_EN
    else:
        answer = prompts.answer_text(number + 1, text, chinese)
    return Example(prompts.chat(turns), answer + prompts.TURN_END + "\n")


def _by_course(every: Sequence[Lecture]) -> dict[str, list[Lecture]]:
    """Return the sections of each file of lecture notes."""
    found: dict[str, list[Lecture]] = {}
    for lecture in every:
        found.setdefault(lecture.passage.group.split("/")[0], []).append(lecture)
    return found


def _is_held_out(passage: Passage) -> bool:
    """Say whether a passage is kept from training: all of a document, one document in 40."""
    return bool(passage.group) and zlib.crc32(passage.group.encode()) % 40 == 0


def _ended(text: str) -> str:
    return text if text[-1:] in ".。！？!?" else text + ("。" if not text.isascii() else ".")
