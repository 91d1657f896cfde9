"""Training of the demo model: its data are its own, the same every time, and it starts again."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from rag.prompt import PromptPassage, build_prompt
from rag.sample import sample_documents_folder, sample_questions_file
from serving import LLM, SamplingParams
from serving.demo_model.training import examples, prompts
from serving.demo_model.training.collect import SOURCES
from serving.demo_model.training.corpus import Corpus, content, make_passage
from serving.demo_model.training.data import (
    ANSWER,
    EASY_SHARDS,
    FIRST,
    TOKEN_BITS,
    generate,
    make_shard,
)
from serving.demo_model.training.examples import Example, Maker, _LineBreaks, _Renaming
from serving.demo_model.training.export import export, load, shape_of
from serving.demo_model.training.lectures import lectures
from serving.demo_model.training.lexicon import HAN
from serving.demo_model.training.model import BlockMasks, Decoder, Shape, attend, dense_mask
from serving.demo_model.training.optimiser import orthogonal
from serving.demo_model.training.overlap import course_runs, runs, shared, training_texts
from serving.demo_model.training.probe import Probe
from serving.demo_model.training.stream import Shards, unpack
from serving.demo_model.training.tasks import KINDS, exact_match, held_out, make_task
from serving.demo_model.training.tokenizer import train as train_tokenizer
from serving.demo_model.training.train import Trainer, arguments, context_weight, rate_scale
from serving.demo_model.vocabulary import write_tokenizer
from serving.tokenizer import Tokenizer

TOY = {
    "vocabulary": 2048,
    "hidden": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 96,
    "context": 1024,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.load(None)


@pytest.fixture(scope="module")
def maker(corpus: Corpus) -> Maker:
    return Maker(corpus)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small = Corpus(corpus.passages[:200])
    write_tokenizer(train_tokenizer(small, vocabulary=2048, examples=20), folder, 1024)
    return folder


def backend(folder: Path) -> Backend:
    return Backend.from_file(str(folder / "tokenizer.json"))


def test_no_text_of_the_sample_course_is_in_the_sources(corpus: Corpus) -> None:
    assert shared(training_texts(corpus)) == []


def test_no_example_contains_text_of_the_sample_course(maker: Maker) -> None:
    texts = [maker.example(Random(n)) for n in range(300)]
    assert shared(e.text() for e in texts) == []


def test_the_search_for_shared_text_finds_it() -> None:
    document = (sample_documents_folder() / "en" / "12-ssa.md").read_text("utf-8")
    question = json.loads(sample_questions_file().read_text("utf-8").splitlines()[0])["question"]
    assert shared([document.upper()])
    known = course_runs()
    assert set(runs(question)) <= known
    assert set(runs(question))


def test_prompts_are_those_of_the_platform() -> None:
    for chinese in (False, True):
        shown = [
            make_passage("g", "Title", "A heading", ["First sentence here. Second one."]),
            make_passage("g", "标题", "标题", ["第一句话。第二句话。"]),
            make_passage("g", 'T"<x>', "H › H", ["Body."], "int main(void)"),
        ]
        terms = [("寄存器", "register"), ("栈", "stack")] if chinese else []
        for passages in (shown, []):
            built = build_prompt(
                course="C",
                question="Why?",
                passages=[
                    PromptPassage(
                        (f"## {p.heading}\n\n" if p.heading != p.title else "")
                        + p.body
                        + (f"\n\n```\n{p.code}\n```" if p.code else ""),
                        p.title,
                        (p.title, p.heading),
                    )
                    for p in passages
                ],
                history=[],
                count_tokens=lambda messages: 1,
                context_tokens=4096,
                answer_reserve=100,
                language="zh" if chinese else "en",
                terms=terms,
            )
            turns = [
                prompts.system("C", chinese),
                prompts.question_turn("Why?", passages, chinese, terms),
            ]
            assert [(m["role"], m["content"]) for m in built.messages] == turns


def test_examples_are_the_same_for_the_same_seed(maker: Maker) -> None:
    def texts(seed: int) -> list[str]:
        rng = Random(seed)
        return [maker.example(rng).text() for _ in range(40)]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_answers_are_copied_from_the_passage_they_cite(maker: Maker) -> None:
    cited = refused = further = 0
    rng = Random(5)
    for _ in range(300):
        pieces = maker.example(rng).pieces()
        shown = pieces[0][0].rsplit("<|im_start|>user\n", 1)[-1].split('<passage n="[')
        for place, (_, said) in enumerate(pieces):
            answer = said.removesuffix("<|im_end|>\n")
            for lead in ("According to [", "根据资料 ["):
                if answer.startswith(lead):
                    number, text = answer.removeprefix(lead).split("]", 1)
                    passage = next(p for p in shown if p.startswith(f"{number}]"))
                    assert text[1:].strip().strip("`").strip() in passage
                    cited += 1
                    further += place > 0
            refused += answer in (prompts.REFUSAL_EN, prompts.REFUSAL_ZH)
    assert cited > 120
    assert refused > 20
    assert further > 100


@pytest.fixture
def whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages stand as they are, so that they can be found in prompts."""
    monkeypatch.setattr(examples, "_BROKEN", 0.0)


@pytest.mark.usefixtures("whole_lines")
def test_further_questions_are_asked_once_and_need_their_section(maker: Maker) -> None:
    """What the notes say answers them is shown, or else the answer is a refusal."""
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for lecture in lectures():
        for number, question in lecture.asked:
            answers[question].append(lecture.passage.sentence(number).strip())
    rng = Random(2)
    answered = refused = 0
    for _ in range(150):
        example = maker._lecture(rng)
        told: set[str] = set()
        for read, said in example.pieces()[1:]:
            line = read.rsplit("<|im_end|>", 1)[0].rsplit("\n", 1)[-1]
            question = line.split(" ", 1)[1]
            assert question not in told
            told.add(question)
            if question in answers:  # as it is in the notes
                refuses = said.startswith((prompts.REFUSAL_EN, prompts.REFUSAL_ZH))
                assert refuses != any(sentence in example.read for sentence in answers[question])
                assert refuses or any(sentence in said for sentence in answers[question])
                answered += not refuses
                refused += refuses
    assert answered > 100
    assert refused > 20


@pytest.mark.usefixtures("whole_lines")
def test_some_further_questions_are_on_something_else_altogether(maker: Maker) -> None:
    """They are refused, as those are that a missing section of the same course answers."""
    courses: defaultdict[str, set[int]] = defaultdict(set)
    for number, (_, asked) in enumerate(maker._courses):
        for lecture in asked:
            for _, question in lecture.asked:
                courses[question].add(number)
    rng = Random(4)
    near = far = 0
    for _ in range(120):
        answered: list[str] = []
        refused: list[str] = []
        for read, said in maker._lecture(rng).pieces():
            line = read.rsplit("<|im_end|>", 1)[0].rsplit("\n", 1)[-1]
            refuses = said.startswith((prompts.REFUSAL_EN, prompts.REFUSAL_ZH))
            (refused if refuses else answered).append(line.split(" ", 1)[1])
        known = [courses[question] for question in answered if question in courses]
        if not known:
            continue
        its = set.intersection(*known)
        assert its
        for question in refused:
            near += bool(courses[question] & its)
            far += question in courses and not courses[question] & its
    assert near > 20
    assert far > 15


@pytest.mark.usefixtures("whole_lines")
def test_held_out_documents_are_shown_by_no_other_maker() -> None:
    bodies = [f"Document number {n} explains how gadget{n} and widget{n} work." for n in range(200)]
    corpus = Corpus([make_passage(f"g{n}", "T", "T", [body]) for n, body in enumerate(bodies)])
    usual, other = Maker(corpus), Maker(corpus, held_out=True)
    assert sorted(usual._numbers + other._numbers) == list(range(200))
    assert 0 < len(other._numbers) < 20
    rng = Random(0)
    for maker, numbers in ((usual, other._numbers), (other, usual._numbers)):
        for _ in range(60):
            read = maker._about_documents(rng, False).read
            assert not any(f'source="T">\n{bodies[n]}' in read for n in numbers)
    hidden = [bodies[n] for n in other._numbers]
    for _ in range(600):  # small talk, asides, lectures and all others
        made = usual.example(rng).text()
        assert not any(body in made for body in hidden)


@pytest.mark.usefixtures("whole_lines")
def test_held_out_lectures_are_shown_by_no_other_maker(maker: Maker) -> None:
    other = Maker(maker.corpus, held_out=True)
    theirs = {lecture.passage.body for _, asked in other._courses for lecture in asked}
    shown = {passage.body for notes, _ in maker._courses for passage in notes.passages}
    assert theirs
    assert len(shown) > 3000
    assert not theirs & shown
    probed = other.on_documents()["lectures"]
    rng = Random(0)
    answered = 0
    for _ in range(60):
        made = probed(rng)
        assert made.read.count("<passage ") <= 6  # four, and what an earlier turn says of them
        if made.answer not in [f"{no}{prompts.TURN_END}\n" for no in
                               (prompts.REFUSAL_EN, prompts.REFUSAL_ZH)]:  # fmt: skip
            answered += 1
            assert any(body in made.read for body in theirs)
    assert answered > 30


@pytest.mark.usefixtures("whole_lines")
def test_wrong_sections_of_lectures_have_words_of_the_question(maker: Maker) -> None:
    """They are what a search for the question would find; at random few would share a word."""
    rng = Random(3)
    shared: list[bool] = []
    at_random: list[bool] = []
    every = [passage for notes, _ in maker._courses for passage in notes.passages]
    for _ in range(60):
        read = maker._lecture(rng, varied=False).read.rsplit("<|im_start|>user", 1)[1]
        question = read.split("\n\n")[0].split(":", 1)[-1].split("：", 1)[-1]
        if HAN.search(question) and not HAN.search(read.split("<passage", 1)[1]):
            continue
        for passage in read.split("<passage ")[1:]:
            shared.append(bool(content(question) & content(passage)))
            at_random.append(bool(content(question) & content(rng.choice(every).body)))
    assert len(shared) > 80
    assert sum(shared) > 0.7 * len(shared)
    assert sum(at_random) < 0.4 * len(shared)


def test_renamed_words_are_the_same_everywhere(maker: Maker) -> None:
    text = "A parser reads tokens. Parsers that read a token twice are slow; parsing is not."
    rename = _Renaming(Random(2), ["zebra", "quartz", "violin", "copper"])
    rename._share = 1.0
    other = rename(text)
    words, others = text.replace(";", "").split(), other.replace(";", "").split()
    assert len(words) == len(others)
    named = dict(zip(words, others, strict=True))
    assert named["parser"].lower() + "s" == named["Parsers"].lower()
    assert named["parser"].removesuffix("er") + "ing" == named["parsing"]
    assert named["token"] + "s." == named["tokens."]
    assert named["A"] == "A"
    assert named["Parsers"][0].isupper()
    assert "parser" not in other.lower()
    assert rename(text) == other


def test_documents_are_learnt_less_and_less_by_heart() -> None:
    weights = [context_weight(n / 100, 0.1) for n in range(101)]
    assert weights[0] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(weights))
    assert weights[35:] == [pytest.approx(0.01)] * 66


def test_a_window_stays_in_its_paragraph() -> None:
    passage = make_passage(
        "g", "T", "T", ["One a. Two b. Three c. Four d. Five e. Six f.", "Seven g."]
    )
    assert passage.window(0) == "One a. Two b. Three c. Four d."
    assert passage.window(1) == "One a. Two b. Three c. Four d."
    assert passage.window(3) == "Three c. Four d. Five e. Six f."
    assert passage.window(5) == "Five e. Six f."
    assert passage.window(6) == "Seven g."
    assert passage.window(2, 2) == "Two b. Three c."


def test_lines_are_broken_in_what_is_shown_and_in_the_answer() -> None:
    english = "A parser reads tokens. It reports `what it` wants. Then it stops."
    broken = _LineBreaks(english, 24)
    assert broken.body == "A parser reads tokens.\nIt reports `what it`\nwants. Then it stops."
    assert broken.put("It reports `what it` wants.") == "It reports `what it`\nwants."
    assert broken.put("wants.") == "wants."
    assert broken.put("another") == "another"
    chinese = "语法分析器读入记号。\n\n它用 LL(1) 表决定选择哪一个产生式，然后继续。"
    lines = _LineBreaks(chinese, 20)
    assert lines.body.replace("\n", "") == chinese.replace("\n", "")
    assert [len(line) for line in lines.body.split("\n")] == [10, 0, 13, 10, 3]
    assert "\n" in lines.put("决定选择哪一个产生式")


def test_first_examples_are_easy(maker: Maker) -> None:
    """One question each; later ones have several on the same passages."""

    def made(easy: bool) -> list[Example]:
        maker.easy = easy
        try:
            return [maker.example(Random(n)) for n in range(200)]
        finally:
            maker.easy = False

    def refused(examples: list[Example]) -> float:
        said = [answer for e in examples for _, answer in e.pieces() if e.read.count("<passage ")]
        return sum(s.startswith((prompts.REFUSAL_EN, prompts.REFUSAL_ZH)) for s in said) / len(said)

    first, later = made(easy=True), made(easy=False)
    assert max(len(e.more) for e in first) == 0
    assert max(len(e.more) for e in later) > 4
    assert max(e.read.count("<passage ") for e in first) <= 7  # 3 in the words before
    assert max(e.read.count("<passage ") for e in later) > 8
    assert refused(first) < 0.2 < refused(later)


def test_tasks_have_their_answer_in_the_prompt_and_held_out_ones_stay_apart() -> None:
    for kind in KINDS:
        tasks = held_out(kind, 30)
        assert tasks == held_out(kind, 30)
        assert all(part in task.prompt for task in tasks for part in task.answer.split(": "))
        trained = {make_task(kind, Random(n)).prompt for n in range(300)}
        assert not trained & {task.prompt for task in tasks}
        assert exact_match(tasks, [f" {task.answer}\n" for task in tasks]) == 1.0
        assert exact_match(tasks, ["?"] * 30) == 0.0


def test_shards_are_the_same_however_many_make_them(tokenizer: Path, tmp_path: Path) -> None:
    made = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        files = list(
            generate(
                tokenizer, folder, corpus=None, seed=3, first=EASY_SHARDS - 1, shards=2,
                workers=workers,
                rows=4, context=2048,
            )
        )  # fmt: skip
        assert [int(f.stem) for f in files] == [EASY_SHARDS - 1, EASY_SHARDS]
        made[workers] = [np.load(f) for f in files]
    assert all((a == b).all() for a, b in zip(made[1], made[2], strict=True))
    assert (made[1][0] != made[1][1]).any()


def test_rows_hold_whole_documents(maker: Maker, tokenizer: Path) -> None:
    encoder = backend(tokenizer)
    shard = make_shard(maker, encoder, 1, EASY_SHARDS, rows=6, context=4096)
    filler = encoder.token_to_id(prompts.END_OF_TEXT)
    tokens, positions, documents, targets, weights = unpack(
        torch.from_numpy(shard.astype(np.int64)), filler, 0.1, 5.0
    )
    assert ((shard & TOKEN_BITS) != filler).mean() > 0.7
    whole = turns = 0
    for row in range(6):
        starts = np.flatnonzero(shard[row] & FIRST)
        for start, end in zip(starts, [*starts[1:], 4096], strict=True):
            ids = shard[row, start:end]
            answers = (ids & ANSWER) != 0
            edges = np.flatnonzero(np.diff(answers.astype(np.int8), prepend=0, append=0)).tolist()
            turns += len(edges) > 2
            wanted = [0.1] * (end - start)
            wanted[-1] *= ids[-1] & TOKEN_BITS != filler
            for first, last in zip(edges[::2], edges[1::2], strict=True):
                before, answer = (
                    encoder.decode((part & TOKEN_BITS).tolist(), skip_special_tokens=False)
                    for part in (ids[:first], ids[first:last])
                )
                assert before.endswith("<|im_start|>assistant\n")
                assert answer.endswith("<|im_end|>\n")
                wanted[first:last] = ([5.0] * 6 + [1.0] * (last - first))[: last - first]
                whole += last == end - start
            found = weights[row, start : end - 1].tolist()
            if ids[0] & TOKEN_BITS != filler:
                assert found == pytest.approx(wanted[1:])
            assert positions[row, start:end].tolist() == list(range(end - start))
            assert len(set(documents[row, start:end].tolist())) == 1
            assert weights[row, start - 1] == 0.0
    assert whole > 10
    assert turns > 3
    assert (targets[:, :-1] == tokens[:, 1:]).all()
    assert weights.unique().tolist() == pytest.approx([0.0, 0.1, 1.0, 5.0])


def test_tokenizer_round_trip_and_chat_template(tokenizer: Path) -> None:
    found = Tokenizer.from_folder(tokenizer)
    assert found is not None
    texts = [
        "寄存器分配：用图着色。 12345 < 0x7f",
        "def f(x_1):\n\treturn x_1 ** 2  # ok\n\n\n",
        "naïve café 🙂 𝛼 ⟦·⟧ “quoted” — dash…",
        "  two  spaces \r\n and\ta tab ",
    ]
    for text in texts:
        assert found.decode(found.encode(text)) == text
    turns = [("system", "S"), ("user", "问题： 为什么？"), ("assistant", "A [1]"), ("user", "B")]
    ids = found.apply_chat_template([{"role": role, "content": text} for role, text in turns])
    assert ids == backend(tokenizer).encode(prompts.chat(turns)).ids


def test_flex_and_dense_attention_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = BlockMasks()
    query = torch.randn(2, 4, 128, 16, generator=generator)
    key, value = (torch.randn(2, 2, 128, 16, generator=generator) for _ in range(2))
    for first, second in ((50, 100), (128, 1), (7, 64)):
        documents = torch.tensor([[int(n >= end) for n in range(128)] for end in (first, second)])
        dense = attend(query, key, value, dense_mask(documents))
        flex = attend(query, key, value, masks(documents))
        torch.testing.assert_close(dense, flex, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [128, 1024])
def test_blocks_of_the_mask_are_those_that_the_documents_touch(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    masks = BlockMasks()
    for share in (0.2, 0.01, 0.001):
        documents = (torch.rand(3, tokens, generator=generator) < share).cumsum(1)
        seen = dense_mask(documents)

        def rule(
            row: Tensor, head: Tensor, query: Tensor, key: Tensor, seen: Tensor = seen
        ) -> Tensor:
            return seen[row, 0, query, key]

        wanted = create_block_mask(rule, 3, None, tokens, tokens, device="cpu")
        found = masks(documents)
        assert (found.to_dense() == wanted.to_dense()).all()
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            ours, theirs = getattr(found, name), getattr(wanted, name)
            assert (ours == theirs).all(), name
            places = name.replace("num_blocks", "indices")
            listed = torch.arange(ours.shape[2]) < ours[..., None]
            assert (getattr(found, places)[listed] == getattr(wanted, places)[listed]).all(), places


def test_orthogonal_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 24), (2, 40, 12)):
        made = orthogonal(torch.randn(shape, generator=generator)).float()
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_rate_rises_stays_and_falls() -> None:
    shares = [n / 100 for n in range(101)]
    scales = [rate_scale(share) for share in shares]
    assert scales[10] == scales[50] == 1.0
    assert scales[0] < 0.1
    assert scales[-1] == pytest.approx(0.03)
    assert all(a >= b for a, b in pairwise(scales[10:]))


@pytest.fixture(scope="module")
def shards(maker: Maker, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(4):
        np.save(
            folder / f"{number:05d}.npy",
            make_shard(maker, backend(tokenizer), 7, number, rows=4, context=768),
        )
    return folder


def leg(run: Path, tokenizer: Path, shards: Path, *more: str) -> None:
    """Train up to where the given shards end, or `--steps` do."""
    Trainer(
        arguments(
            [
                f"--run={run}", f"--tokenizer={tokenizer}", f"--shards={shards}", "--rows=4",
                "--device=cpu", "--attention=dense", "--no-compile", "--no-bf16", "--resume",
                f"--shape={json.dumps(TOY)}", *more,
            ]
        )
    ).run()  # fmt: skip


def test_a_resumed_training_ends_in_the_same_state(
    tokenizer: Path, shards: Path, tmp_path: Path
) -> None:
    leg(tmp_path / "whole", tokenizer, shards, "--steps=4")
    half = tmp_path / "half-of-shards"
    half.mkdir()
    for number in range(2):
        (half / f"{number:05d}.npy").symlink_to(shards / f"{number:05d}.npy")
    leg(tmp_path / "legs", tokenizer, half, "--steps=4")
    first = load_file(tmp_path / "legs" / "state.safetensors")
    leg(tmp_path / "legs", tokenizer, shards, "--steps=4")
    whole = load_file(tmp_path / "whole" / "state.safetensors")
    legs = load_file(tmp_path / "legs" / "state.safetensors")
    assert whole.keys() == legs.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(legs[name], tensor, msg=name)
    assert any((first[name] != tensor).any() for name, tensor in legs.items())
    progress = json.loads((tmp_path / "legs" / "model" / "training.json").read_text())
    assert progress["step"] == 4
    assert progress["shard"] == 4


def test_training_lowers_the_loss(tokenizer: Path, shards: Path, tmp_path: Path) -> None:
    args = arguments(
        [
            f"--run={tmp_path}", f"--tokenizer={tokenizer}", "--device=cpu", "--attention=dense",
            "--no-compile", "--no-bf16", "--steps=100", f"--shape={json.dumps(TOY)}",
        ]
    )  # fmt: skip
    trainer = Trainer(args)
    batch = torch.from_numpy(np.load(shards / "00000.npy").astype(np.int64))[:2]
    losses = [trainer.step(batch)[0].item() for _ in range(12)]
    assert losses[-1] < losses[0] - 1.0


def test_an_exported_model_answers_alike_here_and_in_transformers(
    tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    model = Decoder(Shape(**TOY))
    with torch.no_grad():  # far from flat, so that greedy choices are clear
        for parameter in model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
        model.embed_tokens.weight.mul_(8.0)
    folder = export(model, tokenizer, tmp_path / "model", {"step": 1})
    assert max(f.stat().st_size for f in folder.glob("*.safetensors")) <= 15_100_000
    weights, progress = load(folder)
    assert progress == {"step": 1}
    card = (folder / "README.md").read_text()
    assert "@" not in card
    assert all(f"| {source.package} | {source.licence} |" in card for source in SOURCES)
    assert shape_of(folder) == model.shape
    again = Decoder(model.shape)
    again.load_state_dict(weights)

    text = prompts.chat([("user", "什么是栈？ What is a stack?")])
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0].tolist() == backend(tokenizer).encode(text).ids
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        own = again(ids, positions, dense_mask(torch.zeros_like(ids)))
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(own, hf(ids).logits, atol=2e-3, rtol=1e-3)
        length = ids.shape[1]
        made = hf.generate(ids, max_new_tokens=12, do_sample=False)[0, length:].tolist()
    with LLM(folder, dtype="float32", max_model_len=512, threads=1) as llm:
        out = llm.generate([text], SamplingParams(temperature=0.0, max_tokens=12))[0]
    assert out.prompt_token_ids == ids[0].tolist()
    assert out.outputs[0].token_ids[: len(made)] == made[: len(out.outputs[0].token_ids)]


def test_large_weights_are_cut_into_small_files(tokenizer: Path, tmp_path: Path) -> None:
    model = Decoder(Shape(**{**TOY, "vocabulary": 12_032, "hidden": 640, "layers": 3}))
    folder = export(model, tokenizer, tmp_path)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}


def test_dropout_is_for_training_alone() -> None:
    model = Decoder(Shape(**TOY), dropout=0.5)
    tokens, positions = torch.arange(12)[None], torch.arange(12)[None]
    assert not torch.equal(model(tokens, positions, None), model(tokens, positions, None))
    model.eval()
    assert torch.equal(model(tokens, positions, None), model(tokens, positions, None))


def test_shares_of_examples_are_whole(maker: Maker) -> None:
    for share in (0.0, 0.3):
        made = Maker(maker.corpus, lectures_share=share)
        for kinds in (made._kinds, made._easy_kinds):
            assert sum(part for part, _ in kinds) == pytest.approx(1)
        assert made._kinds[0][0] == share


def test_probe_reads_citations_and_refusals(maker: Maker, tokenizer: Path, tmp_path: Path) -> None:
    passages = [make_passage("g", "T", "T", [f"Fact {n} here."]) for n in range(3)]
    rows = []
    for right, question in (([2], "Why?"), ([1], "为什么？"), ([], "What else?")):
        chinese = question == "为什么？"
        turns = [prompts.question_turn(question, passages, chinese)]
        messages = [{"role": role, "content": text} for role, text in turns]
        rows.append({"messages": messages, "right": right, "answerable": bool(right), "set": "x"})
    file = tmp_path / "probe.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    probe = Probe(tokenizer)
    probe.read(file)
    probe.make(maker, 8)
    model = Decoder(Shape(**TOY), dropout=0.5)
    figures = probe.measure(model, torch.device("cpu"))
    assert figures == probe.measure(model, torch.device("cpu"))
    assert model.training
    measured = {name.split(" ", 1)[1] for name in figures if name.startswith("cite ")}
    assert measured == {"x", "documents", "documents zh", "lectures"}
    assert {"refusal x", "false refusal x"} <= set(figures)
    assert all(0.0 <= figure <= 1.0 for figure in figures.values())


def test_easy_shards_are_not_read_again_among_hard_ones(tmp_path: Path) -> None:
    for number in (EASY_SHARDS - 1, EASY_SHARDS):
        np.save(tmp_path / f"{number:05d}.npy", np.full((1, 4), number, dtype=np.uint16))
    shards = Shards(tmp_path, 0, None, replay=True)
    read = [int(shards.next()[0, 0]) for _ in range(20)]
    assert read == [EASY_SHARDS - 1] + [EASY_SHARDS] * 19
    assert shards.replayed == 18


def test_the_stream_is_endless(maker: Maker, tokenizer: Path) -> None:
    from serving.demo_model.training.data import documents

    found = list(islice(documents(maker, backend(tokenizer), Random(1), 4096), 130))
    assert len(found) == 130
    assert all((ids[0] & FIRST) and not (ids[1:] & FIRST).any() for ids in found)
