"""Generated tasks that cached-KV reuse is judged by, and their exact-match evaluation.

Every kind spreads its facts over several segments:

- `recall`: pairs of key and value in several segments; one key is asked for.
- `two_hop`: one segment says where a thing is, another the code of that place; both are asked for.
- `choose`: candidates make claims, one segment holds the evidence; the letter of the candidate
  that agrees with it is asked for.
- `copy`: an identifier or line of code of a named segment, exactly.

    python -m serving.demo_model.training.tasks MODEL_FOLDER --count 200
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from serving.demo_model.training.frames import identifier

#: Examples of the training stream use seeds below it, held-out ones seeds from here on.
HELD_OUT = 1 << 40
KINDS = ("recall", "two_hop", "choose", "copy")

_ANIMAL_NAMES = """
otter falcon badger heron lynx marten osprey plover raven shrike tapir viper weasel
yak zebra beetle cicada dingo ermine ferret gecko hornet ibis jackal kestrel lemur mantis newt
ocelot panther quail rhino salmon toucan urchin vole walrus"""
_ANIMALS = _ANIMAL_NAMES.split()
_COLOUR_NAMES = """
amber azure beige black bronze coral crimson cyan gold green grey indigo ivory jade
khaki lilac lime magenta maroon navy ochre olive orange pink plum red rose ruby silver teal violet
white yellow"""
_COLOURS = _COLOUR_NAMES.split()
_ANIMAL_NAMES_ZH = "狐狸 老虎 大象 海豚 猎豹 天鹅 乌龟 蜻蜓 松鼠 骆驼 孔雀 鲸鱼 刺猬 羚羊 企鹅 蝴蝶"
_ANIMALS_ZH = _ANIMAL_NAMES_ZH.split()
_COLOUR_NAMES_ZH = "红 橙 黄 绿 青 蓝 紫 黑 白 灰 金 银"
_COLOURS_ZH = _COLOUR_NAMES_ZH.split()


@dataclass(frozen=True, slots=True)
class Task:
    """A question over segments and its only right answer."""

    kind: str
    prompt: str
    answer: str


def make_task(kind: str, rng: Random, chinese: bool | None = None) -> Task:
    """Return a task; the language is drawn if not given."""
    if chinese is None:
        chinese = rng.random() < 0.4
    return _MAKERS[kind](rng, chinese)


def held_out(kind: str, count: int, seed: int = 0) -> list[Task]:
    """Return tasks that no training stream contains: their seeds are apart from its own."""
    return [
        make_task(kind, Random((HELD_OUT + seed * 1_000_003 + n) * 8 + KINDS.index(kind)))
        for n in range(count)
    ]


def _key(rng: Random, chinese: bool) -> str:
    number = rng.randint(10, 999)
    if chinese and rng.random() < 0.6:
        return f"{rng.choice(_COLOURS_ZH)}{rng.choice(_ANIMALS_ZH)}{number}"
    return f"{rng.choice(_COLOURS)}-{rng.choice(_ANIMALS)}-{number}"


def _value(rng: Random) -> str:
    if rng.random() < 0.3:
        return identifier(rng)
    letters = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))
    return rng.choice((str(rng.randint(100, 99999)), f"{letters}-{rng.randint(1, 99)}", letters))


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def _segments(parts: list[list[str]], chinese: bool) -> str:
    head = "片段" if chinese else "Segment"
    return "\n\n".join(
        f"{head} {number}:\n" + "\n".join(lines) for number, lines in enumerate(parts, start=1)
    )


def _recall(rng: Random, chinese: bool) -> Task:
    count = rng.choice((1, 2, 3, 4, 4, 5, 6, 10))
    each = rng.randint(2, 8)
    keys = _distinct(lambda: _key(rng, chinese), count * each)
    pairs = [(key, _value(rng)) for key in keys]
    mark = rng.choice((" = ", ": ", " -> "))
    parts = [[f"{k}{mark}{v}" for k, v in pairs[i * each : (i + 1) * each]] for i in range(count)]
    key, value = rng.choice(pairs)
    ask = f"问题：{key} 的值是什么？" if chinese else f"Question: What is the value of {key}?"
    return Task("recall", f"{_segments(parts, chinese)}\n\n{ask}", value)


def _two_hop(rng: Random, chinese: bool) -> Task:
    count = rng.randint(2, 6)
    things = _distinct(lambda: _key(rng, chinese), count)
    places = _distinct(lambda: identifier(rng), count)
    values = _distinct(lambda: _value(rng), count)
    order = rng.sample(range(count), count)
    if chinese:
        first = [f"{t} 放在 {p} 里。" for t, p in zip(things, places, strict=True)]
        second = [f"{places[i]} 的代码是 {values[i]}。" for i in order]
    else:
        first = [f"{t} is kept in {p}." for t, p in zip(things, places, strict=True)]
        second = [f"The code of {places[i]} is {values[i]}." for i in order]
    parts = [first, second]
    for _ in range(rng.choice((0, 0, 1, 2))):
        parts.append([f"{_key(rng, chinese)} = {_value(rng)}" for _ in range(rng.randint(2, 4))])
    rng.shuffle(parts)
    chosen = rng.randrange(count)
    thing = things[chosen]
    ask = (
        f"问题：{thing} 放在哪里？那里的代码是什么？"
        if chinese
        else f"Question: Where is {thing} kept, and what is the code of that place?"
    )
    answer = f"{places[chosen]}: {values[chosen]}"
    return Task("two_hop", f"{_segments(parts, chinese)}\n\n{ask}", answer)


def _choose(rng: Random, chinese: bool) -> Task:
    count = rng.randint(2, 4)
    keys = _distinct(lambda: _key(rng, chinese), rng.randint(2, 6))
    table = {key: _value(rng) for key in keys}
    asked = rng.choice(keys)
    wrong = _distinct(lambda: _value(rng), count)
    right = rng.randrange(count)
    claims = [table[asked] if i == right else wrong[i] for i in range(count)]
    evidence = [f"{k} = {v}" for k, v in table.items()]
    if chinese:
        candidates = [[f"候选 {'ABCD'[i]}：{asked} 的值是 {c}。"] for i, c in enumerate(claims)]
        ask = "问题：哪个候选与证据一致？"
    else:
        candidates = [
            [f"Candidate {'ABCD'[i]}: the value of {asked} is {c}."] for i, c in enumerate(claims)
        ]
        ask = "Question: Which candidate agrees with the evidence?"
    parts = [evidence, *candidates]
    if rng.random() < 0.5:
        rng.shuffle(parts)
    return Task("choose", f"{_segments(parts, chinese)}\n\n{ask}", "ABCD"[right])


def _copy(rng: Random, chinese: bool) -> Task:
    names = _distinct(lambda: _key(rng, chinese), rng.randint(2, 5))
    lines = []
    for _ in names:
        call = f"{identifier(rng)}({identifier(rng)}, {rng.randint(0, 4096)})"
        lines.append(rng.choice((f"{identifier(rng)} = {call};", call, f"if ({call}) return;")))
    parts = [[f"# {name}", line] for name, line in zip(names, lines, strict=True)]
    chosen = rng.randrange(len(names))
    ask = (
        f"问题：照抄 {names[chosen]} 下面那行代码。"
        if chinese
        else f"Question: Copy the line of code below {names[chosen]}."
    )
    return Task("copy", f"{_segments(parts, chinese)}\n\n{ask}", lines[chosen])


_MAKERS: dict[str, Callable[[Random, bool], Task]] = {
    "recall": _recall, "two_hop": _two_hop, "choose": _choose, "copy": _copy,
}  # fmt: skip


def exact_match(tasks: list[Task], answers: list[str]) -> float:
    """Return the share of answers that are right but for white space around them."""
    right = sum(a.strip() == t.answer for t, a in zip(tasks, answers, strict=True))
    return right / len(tasks) if tasks else 0.0


def evaluate(folder: Path, count: int, seed: int = 0, **settings: Any) -> dict[str, float]:
    """Answer held-out tasks greedily in our engine; return exact match by kind."""
    from serving import LLM, SamplingParams
    from serving.demo_model.training.prompts import chat

    figures = {}
    with LLM(folder, **settings) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=64)
        for kind in KINDS:
            tasks = held_out(kind, count, seed)
            prompts = [chat([("user", task.prompt)]) for task in tasks]
            outputs = llm.generate(prompts, greedy)
            figures[kind] = exact_match(tasks, [o.outputs[0].text for o in outputs])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match on held-out generated tasks.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(evaluate(arguments.model, arguments.count, arguments.seed)))


if __name__ == "__main__":
    main()
