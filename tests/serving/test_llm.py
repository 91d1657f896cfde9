"""The offline class: shapes of its answers, texts, stops, seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serving import LLM, SamplingParams
from serving.errors import EngineDeadError, InvalidRequestError
from tests.serving.processes import children_of, eventually, gone
from tests.serving.tiny import make_checkpoint

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "qwen3"
    return make_checkpoint(folder, "qwen3", with_tokenizer=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(
        checkpoint,
        pipeline_parallel_size=2,
        dtype="float32",
        enable_prefix_caching=True,
        max_num_batched_tokens=512,
        num_kv_pages=None,
        kv_memory=1 << 24,
        max_num_seqs=32,
        threads=1,
    ) as llm:
        yield llm


def test_strings_and_ids_in_order(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("hello")
    mixed = llm.generate(["hello", ids, "课程", [5, 6]], GREEDY)
    assert [result.prompt for result in mixed] == ["hello", None, "课程", None]
    assert mixed[0].prompt_token_ids == ids == mixed[1].prompt_token_ids
    assert mixed[0].outputs[0].token_ids == mixed[1].outputs[0].token_ids
    for result in mixed:
        output = result.outputs[0]
        assert output.index == 0
        assert output.finish_reason in ("length", "stop")
        assert len(output.token_ids) <= 24
    assert llm.generate("hello", GREEDY)[0].outputs == mixed[0].outputs
    assert llm.generate(ids, GREEDY)[0].outputs == mixed[0].outputs


def test_text_is_that_of_the_tokens(llm: LLM) -> None:
    assert llm.tokenizer is not None
    output = llm.generate("the course", GREEDY)[0].outputs[0]
    detokenizer = llm.tokenizer.detokenizer()
    assert output.text == detokenizer.feed(output.token_ids) + detokenizer.finish()


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    plain = llm.generate("abc", GREEDY)[0].outputs[0]
    stop = next(piece for piece in plain.text[4:] if piece.isprintable() and piece != "\ufffd")
    params = SamplingParams(max_tokens=24, temperature=0.0, stop=[stop])
    output = llm.generate("abc", params)[0].outputs[0]
    assert output.text == plain.text[: plain.text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == plain.token_ids[: len(output.token_ids)]


def test_stop_ids_min_tokens_and_ignore_eos(llm: LLM) -> None:
    long = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    plain = llm.generate([9, 8, 7], long)[0].outputs[0].token_ids
    assert len(plain) == 40
    stop = plain[5]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop_token_ids=[stop])
    output = llm.generate([9, 8, 7], params)[0].outputs[0]
    assert output.token_ids == plain[: plain.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    at_least = SamplingParams(
        max_tokens=40, temperature=0.0, ignore_eos=True, stop_token_ids=[stop], min_tokens=20
    )
    tokens = llm.generate([9, 8, 7], at_least)[0].outputs[0].token_ids
    assert len(tokens) >= 20
    assert stop not in tokens[:20]


def test_logprobs_belong_to_their_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)
    neighbour = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=8)
    output, other = (
        result.outputs[0] for result in llm.generate([[1, 2], [3, 4]], [params, neighbour])
    )
    assert output.logprobs is not None
    assert other.logprobs is not None
    assert [item.token_id for item in output.logprobs] == output.token_ids
    for item in output.logprobs:
        assert len(item.top_ids) == 3
        assert item.top_ids[0] == item.token_id
        assert item.top_logprobs[0] == pytest.approx(item.logprob, abs=1e-4)
    assert all(len(item.top_ids) == 8 for item in other.logprobs)


def test_choices_share_the_prompt_and_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.5, n=4, seed=3, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3]], params)[0].outputs
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in outputs}) == 4


@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        (1, {"max_num_batched_tokens": 16}),
        (2, {"num_kv_pages": 14, "enable_prefix_caching": False, "schedule_policy": "classic"}),
        (3, {}),
    ],
)
def test_a_seed_gives_the_same_text_whatever_else_happens(
    llm: LLM, checkpoint: Path, stages: int, settings: dict[str, object]
) -> None:
    """Alone in one engine; with neighbours, other slots, preemption, other stages in another."""
    params = [
        SamplingParams(max_tokens=40, temperature=0.9, seed=11, top_p=0.95, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=1.3, seed=12, top_k=40, ignore_eos=True),
        SamplingParams(
            max_tokens=40, seed=2**64 - 1, repetition_penalty=1.3, presence_penalty=0.4,
            ignore_eos=True,
        ),
        SamplingParams(max_tokens=40, seed=-5, min_p=0.02, frequency_penalty=0.3, ignore_eos=True),
    ]  # fmt: skip
    prompts = [[1, 2, 3] * 20, [4, 5], [6, 7, 8, 9], [10] * 33]
    alone = [llm.generate(p, s)[0].outputs[0] for p, s in zip(prompts, params, strict=True)]
    noise = SamplingParams(max_tokens=30, temperature=1.0)
    with LLM(
        checkpoint,
        pipeline_parallel_size=stages,
        dtype="float32",
        **({"num_kv_pages": 64, "max_num_seqs": 16, "threads": 1} | settings),  # type: ignore[arg-type]
    ) as other:
        crowd = other.generate([[t, t + 1] for t in range(5)] + prompts, [noise] * 5 + params)
        together = [result.outputs[0] for result in crowd[5:]]
        assert [output.token_ids for output in together] == [output.token_ids for output in alone]
        assert [output.text for output in together] == [output.text for output in alone]
        if "num_kv_pages" in settings:
            assert eventually(lambda: other.engine.stats.preemptions > 0, 5)


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.5, ignore_eos=True)
    outputs = llm.generate([[1, 2, 3]] * 3, params)
    assert len({tuple(result.outputs[0].token_ids) for result in outputs}) == 3


def test_a_bad_prompt_is_refused_before_any_runs(llm: LLM) -> None:
    before = llm.engine.stats.prompt_tokens
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate([[1, 2], []], GREEDY)
    with pytest.raises(InvalidRequestError, match="2 prompts but 1"):
        llm.generate([[1], [2]], [GREEDY])
    assert llm.engine.stats.prompt_tokens == before
    assert llm.generate([], GREEDY) == []


def test_without_a_tokenizer_only_ids_are_served_and_close_ends_everything(
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path / "llama", "llama")
    llm = LLM(str(folder), dtype="float32", num_kv_pages=32, threads=1)
    engines = llm.engine._driver
    assert engines is not None
    children = [psutil.Process(engines.pid), *children_of(engines.pid, "serving.stage")]
    assert len(children) == 2
    output = llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0]
    assert output.text == ""
    assert output.token_ids
    with pytest.raises(InvalidRequestError, match="no tokenizer"):
        llm.generate(["text"], GREEDY)
    with pytest.raises(InvalidRequestError, match="stop strings"):
        llm.generate([[1]], SamplingParams(stop=["x"]))
    llm.close()
    llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([[1]], GREEDY)
    assert eventually(lambda: gone(children))
    assert llm.engine.state == "dead"
