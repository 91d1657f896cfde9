"""Each filter and penalty against a plain reading of its definition, alone and in mixed batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serving.core import SamplingParams
from serving.sampling import Sampler, stream_key, uniforms
from serving.sampling.candidates import largest
from serving.sampling.draw import draw
from serving.sampling.filters import logit_floor


def _logits(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def _expected(logits: Tensor, params: SamplingParams, position: int, choice: int = 0) -> int:
    """One row by transformers' filters and a cumulative sum over the whole vocabulary."""
    scores = (logits / params.temperature).unsqueeze(0)
    none = torch.zeros(1, 0, dtype=torch.long)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(none, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(none, scores)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(none, scores)
    assert params.seed is not None
    key = np.array([stream_key(params.seed, choice)], dtype=np.uint64)
    u = uniforms(key, np.array([position]))[0]
    ends = torch.softmax(scores[0].double(), -1).cumsum(-1)
    return int(torch.searchsorted(ends, torch.tensor(u * float(ends[-1]), dtype=torch.double)))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 200},
    {"top_p": 0.3},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_p": 0.99, "temperature": 5.0},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
]


@pytest.mark.parametrize("vocab", [7, 256, 1000, 40_000])
def test_every_setting_alone_and_in_one_batch(vocab: int) -> None:
    logits = _logits(len(SETTINGS), vocab)
    sampler = Sampler(vocab, 32)
    every = [SamplingParams(seed=100 + i, **values) for i, values in enumerate(SETTINGS)]
    for position in range(5, 11 if vocab > 10_000 else 35):
        for slot, params in enumerate(every):
            sampler.admit(slot + 3, params, [1, 2, 3], 3)
        slots = torch.arange(len(every)) + 3
        got = sampler.sample(logits, slots, [position] * len(every)).token_ids
        for slot, params in enumerate(every):
            assert int(got[slot]) == _expected(logits[slot], params, position), params


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([5, 130, 700, 20_000]),
    seed=st.integers(0, 10**6),
    scale=st.floats(0.01, 8.0),
    temperature=st.floats(0.1, 4.0),
    top_k=st.integers(0, 300),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0, width=32, allow_subnormal=False),
    rounded=st.booleans(),
)
def test_the_floor_keeps_what_the_definitions_keep(
    vocab: int,
    seed: int,
    scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    rounded: bool,
) -> None:
    """Naively sorted; `rounded` makes many logits equal, as bfloat16 does."""
    logits = _logits(1, vocab, seed, scale)
    if rounded:
        logits = logits.to(torch.bfloat16).float()
    top_k = 0 if top_k >= vocab else top_k
    mass = torch.softmax(logits / temperature, -1)
    floor = logit_floor(
        logits,
        mass,
        torch.tensor([temperature]),
        torch.tensor([top_k]),
        torch.tensor([top_p]),
        torch.tensor([min_p]),
        top_k,
    )
    ordered = logits[0].double().sort(descending=True).values
    weights = ((ordered - ordered[0]) / temperature).exp()
    if top_k:
        ordered, weights = ordered[:top_k], weights[:top_k]
    shares = weights / weights.sum()
    before = shares.cumsum(0) - shares
    p = float(torch.tensor(top_p))
    margin = float((before - p).abs().min())
    kept = ordered[before < p] if p < 1.0 else ordered
    bound = kept[-1] if kept.numel() else ordered[0]
    low = float(ordered[0]) + temperature * math.log(min_p) if min_p > 0 else -math.inf
    if margin > 1e-5:  # not within rounding of the boundary itself
        unlimited = not top_k and p >= 1.0
        expected = low if unlimited else max(float(bound), low)
        assert float(floor[0]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from([1, 6, 128, 1000, 33_333]),
    count=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_largest_equals_a_full_sort(rows: int, vocab: int, count: int, seed: int) -> None:
    logits = _logits(rows, vocab, seed)
    count = min(count, vocab)
    values, ids = largest(logits, count)
    assert torch.equal(values, logits.sort(-1, descending=True).values[:, :count])
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())


@pytest.mark.parametrize("vocab", [1, 3, 256, 257, 1500])
def test_the_draw_walks_the_vocabulary_in_order(vocab: int) -> None:
    mass = torch.rand(1, vocab, generator=torch.Generator().manual_seed(1))
    mass[:, ::3] = 0.0
    if vocab == 1:
        mass[:] = 1.0
    ends = mass[0].double().cumsum(-1)
    for u in [1e-17, 0.1, 0.25, 0.5, 0.75, 0.999, 1 - 1e-16]:
        token = int(draw(mass, torch.tensor([u], dtype=torch.float64))[0])
        assert mass[0, token] > 0
        total, slack = float(ends[-1]), 1e-6 * vocab
        assert float(ends[token]) >= u * total - slack
        assert float(ends[token] - mass[0, token]) <= u * total + slack


def _chi_square(counts: Tensor, shares: Tensor) -> float:
    expected = shares * counts.sum()
    held = expected > 0
    assert int(counts[~held].sum()) == 0, "a token without mass was drawn"
    return float((((counts - expected) ** 2)[held] / expected[held]).sum())


@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.7}, {"min_p": 0.1}]
)
def test_tokens_follow_the_distribution(values: dict[str, Any]) -> None:
    vocab, draws = 20, 8000
    row = _logits(1, vocab, 4, 1.0)
    params = SamplingParams(seed=11, **values)
    scores = row / params.temperature
    none = torch.zeros(1, 0, dtype=torch.long)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(none, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(none, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(none, scores)
    shares = torch.softmax(scores[0].double(), -1)
    sampler = Sampler(vocab, 64)
    for slot in range(64):
        sampler.admit(slot, params, [1], 1)
    counts = torch.zeros(vocab, dtype=torch.float64)
    logits = row.expand(64, vocab)
    for start in range(0, draws, 64):
        out = sampler.sample(logits, torch.arange(64), list(range(start, start + 64)))
        counts += torch.bincount(out.token_ids, minlength=vocab)
    assert _chi_square(counts, shares) < 50  # at most 19 degrees of freedom, p about 1e-4


def test_a_row_does_not_depend_on_slot_or_neighbours() -> None:
    vocab = 5000
    mine = SamplingParams(seed=5, temperature=0.9, top_p=0.95, repetition_penalty=1.2)
    row = _logits(1, vocab, 9)
    alone = Sampler(vocab, 1)
    alone.admit(0, mine, [4, 5, 6], 3, choice=2)
    wanted = []
    for position in range(3, 13):
        wanted.append(int(alone.sample(row, torch.tensor([0]), [position]).token_ids[0]))

    crowd = Sampler(vocab, 50)
    crowd.admit(41, mine, [4, 5, 6], 3, choice=2)
    others = [SamplingParams(seed=i, top_k=3 * i, logprobs=i % 3) for i in range(5)]
    for slot, params in enumerate(others):
        crowd.admit(slot, params, [1, 2], 2)
    for step, position in enumerate(range(3, 13)):
        if step == 5:  # preempted, then replayed in another slot
            crowd.release(41)
            crowd.admit(17, mine, [4, 5, 6, *wanted[:5]], 3, choice=2)
        logits = torch.cat((_logits(3, vocab, step), row, _logits(2, vocab, step + 50)))
        slots = torch.tensor([0, 1, 2, 41 if step < 5 else 17, 3, 4])
        out = crowd.sample(logits, slots, [9, 8, 7, position, 6, 5])
        assert int(out.token_ids[3]) == wanted[step]


def test_choices_and_seeds_differ() -> None:
    row = _logits(1, 1000, 2, 0.1)
    sampler = Sampler(1000, 8)
    texts = set()
    for seed, choice in [(1, 0), (1, 1), (2, 0), (2, 1)]:
        sampler.admit(0, SamplingParams(seed=seed), [1], 1, choice)
        texts.add(
            tuple(int(sampler.sample(row, torch.tensor([0]), [p]).token_ids) for p in range(1, 9))
        )
    assert len(texts) == 4


def _penalised(logits: Tensor, params: SamplingParams, prompt: list[int], out: list[int]) -> Tensor:
    scores = logits.clone().unsqueeze(0)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([prompt + out])
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, scores)
    for token in set(out):
        scores[0, token] -= params.frequency_penalty * out.count(token) + params.presence_penalty
    return scores[0]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_penalties_follow_their_definitions(data: st.DataObject) -> None:
    """Random sequences come and go over greedy steps, beside rows without penalties."""
    vocab = 12
    sampler = Sampler(vocab, 6)
    live: dict[int, tuple[SamplingParams, list[int], list[int]]] = {}
    penalty = st.floats(-2.0, 2.0)
    for step in range(12):
        for slot in range(4):
            if slot not in live or data.draw(st.integers(0, 5)) == 0:
                prompt = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=9))
                out = data.draw(st.lists(st.integers(0, vocab - 1), max_size=4))
                params = SamplingParams(
                    temperature=0.0,
                    repetition_penalty=data.draw(st.sampled_from([1.0, 0.5, 1.7])),
                    presence_penalty=data.draw(penalty),
                    frequency_penalty=data.draw(penalty),
                )
                sampler.admit(slot, params, prompt + out, len(prompt))
                live[slot] = (params, prompt, out)
        logits = _logits(4, vocab, step, 2.0)
        before = logits.clone()
        places = [len(live[slot][1]) + len(live[slot][2]) for slot in range(4)]
        got = sampler.sample(logits, torch.arange(4), places).token_ids.tolist()
        assert torch.equal(logits, before), "the caller's logits were changed"
        for slot, (params, prompt, out) in live.items():
            assert got[slot] == int(_penalised(logits[slot], params, prompt, out).argmax())
            out.append(got[slot])


def test_long_penalised_sequences_outgrow_their_first_space() -> None:
    vocab = 5000
    sampler = Sampler(vocab, 4)
    prompt = list(range(100, 400))
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0, presence_penalty=1.0)
    sampler.admit(2, params, prompt, len(prompt))
    logits = torch.zeros(1, vocab)
    logits[0, :700] = torch.linspace(0.9, 0.2, 700)
    tokens = []
    for step in range(600):
        out = sampler.sample(logits, torch.tensor([2]), [len(prompt) + step])
        tokens.append(int(out.token_ids))
    assert tokens == list(range(600))


def test_min_tokens_bans_what_would_stop() -> None:
    sampler = Sampler(10, 4, eos_token_ids=(3,))
    logits = torch.zeros(3, 10)
    logits[:, 3], logits[:, 7], logits[:, 5] = 9.0, 8.0, 7.0
    base = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": [7]}
    sampler.admit(0, SamplingParams(**base), [1, 2], 2)
    sampler.admit(1, SamplingParams(**base, ignore_eos=True), [1, 2], 2)
    sampler.admit(2, SamplingParams(temperature=0.0), [1, 2], 2)
    slots = torch.arange(3)
    for position in (2, 3):
        assert sampler.sample(logits, slots, [position] * 3).token_ids.tolist() == [5, 3, 3]
    assert sampler.sample(logits, slots, [4] * 3).token_ids.tolist() == [3, 3, 3]


def test_greedy_rows_need_no_seed_and_sampled_rows_do() -> None:
    sampler = Sampler(10, 2)
    sampler.admit(0, SamplingParams(temperature=0.0), [1], 1)
    with pytest.raises(ValueError, match="seed"):
        sampler.admit(1, SamplingParams(temperature=1.0), [1], 1)


def test_logprobs_come_from_the_models_own_logits() -> None:
    vocab = 3000
    logits = _logits(4, vocab, 6)
    sampler = Sampler(vocab, 4)
    sampler.admit(0, SamplingParams(seed=1, temperature=0.3, top_k=9, logprobs=4), [1], 1)
    sampler.admit(1, SamplingParams(seed=1), [1], 1)
    sampler.admit(2, SamplingParams(temperature=0.0, repetition_penalty=9.0, logprobs=0), [1], 1)
    sampler.admit(3, SamplingParams(seed=3, logprobs=2), [1], 1)
    out = sampler.sample(logits, torch.arange(4), [1] * 4)
    assert out.logprobs is not None
    assert out.top_ids is not None
    assert out.top_logprobs is not None
    scores = torch.log_softmax(logits, -1)
    for row in (0, 2, 3):
        expected = scores[row, out.token_ids[row]]
        torch.testing.assert_close(out.logprobs[row], expected, atol=1e-5, rtol=1e-5)
    for row in (0, 3):
        best = scores[row].topk(4)
        assert torch.equal(out.top_ids[row], best.indices)
        torch.testing.assert_close(out.top_logprobs[row], best.values, atol=1e-5, rtol=1e-5)
    assert out.logprobs[1] == 0
    sampler.release(0)
    sampler.release(2)
    sampler.release(3)
    assert sampler.sample(logits[1:2], torch.tensor([1]), [2]).logprobs is None


def test_a_released_slot_forgets_everything() -> None:
    sampler = Sampler(50, 2, eos_token_ids=(4,))
    loud = SamplingParams(
        seed=1, top_k=2, logprobs=3, min_tokens=9, presence_penalty=2.0, repetition_penalty=3.0
    )
    sampler.admit(0, loud, [1, 4], 1)
    sampler.release(0)
    sampler.admit(0, SamplingParams(temperature=0.0), [1], 1)
    logits = torch.zeros(1, 50)
    logits[0, 4] = 1.0
    out = sampler.sample(logits, torch.tensor([0]), [1])
    assert out.token_ids.tolist() == [4]
    assert out.logprobs is None


@pytest.mark.parametrize("temperature", [1e-9, 1e-5, 1e-4, 1e4])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = _logits(1, 300, 3) * 30
    sampler = Sampler(300, 1)
    sampler.admit(0, SamplingParams(seed=2, temperature=temperature, top_p=0.9), [1], 1)
    token = int(sampler.sample(logits, torch.tensor([0]), [1]).token_ids)
    assert 0 <= token < 300
    if temperature < 1:
        assert token == int(logits.argmax())
