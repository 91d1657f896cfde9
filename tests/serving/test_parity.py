"""Greedy output equals transformers' `generate`, token for token, in fp32.

Families x pipeline size x prefix cache x chunk size x forced preemption: the twelve combinations of
COVERING hold every pair of values; the full product runs under the marker `full`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from serving import LLM, SamplingParams
from tests.serving.processes import eventually
from tests.serving.tiny import FAMILIES, greedy_answers, make_checkpoint

PAGE_SIZE = 16
FEW_PAGES = 14  # the longest prompt and its answer need 10


class Case(NamedTuple):
    family: str
    stages: int
    caching: bool
    chunk: int
    starved: bool


VALUES: list[list[object]] = [
    list(FAMILIES),
    [1, 2, 3],
    [False, True],
    [16, 512],
    [False, True],
]

COVERING = [
    Case("llama", 1, True, 16, True),
    Case("llama", 2, False, 512, False),
    Case("llama", 3, True, 512, False),
    Case("qwen2", 1, True, 512, False),
    Case("qwen2", 2, True, 16, True),
    Case("qwen2", 3, False, 16, True),
    Case("qwen3", 1, True, 512, True),
    Case("qwen3", 2, False, 16, True),
    Case("qwen3", 3, False, 512, False),
    Case("mistral", 1, False, 512, True),
    Case("mistral", 2, True, 16, True),
    Case("mistral", 3, True, 16, False),
]


def make_prompts() -> list[list[int]]:
    """Lengths around page and chunk boundaries, two families of shared beginnings, one twice."""
    source = random.Random(7)

    def draw(count: int) -> list[int]:
        return [source.randrange(256) for _ in range(count)]

    course, log = draw(48), draw(33)
    alone = [draw(length) for length in (1, 2, 15, 16, 17, 32, 70, 118)]
    return [*alone, course + draw(9), course + draw(30), log + draw(1), log + draw(31), course]


PROMPTS = make_prompts()
LENGTHS = [24, 40, 33, 17, 25, 40, 28, 32, 21, 30, 36, 24, 16]
PARAMS = [SamplingParams(max_tokens=length, temperature=0.0) for length in LENGTHS]

Reference = Callable[[str], tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Checkpoint folder of a family, and what transformers generates for each prompt."""
    done: dict[str, tuple[Path, list[list[int]]]] = {}
    torch.set_num_threads(1)  # threads of tiny products cost more than they bring

    def of(family: str) -> tuple[Path, list[list[int]]]:
        if family not in done:
            folder = make_checkpoint(tmp_path_factory.mktemp(family) / family, family)
            done[family] = (folder, greedy_answers(folder, PROMPTS, LENGTHS))
        return done[family]

    return of


def check(case: Case, reference: Reference) -> None:
    folder, expected = reference(case.family)
    with LLM(
        folder,
        pipeline_parallel_size=case.stages,
        dtype="float32",
        page_size=PAGE_SIZE,
        enable_prefix_caching=case.caching,
        max_num_batched_tokens=case.chunk,
        num_kv_pages=FEW_PAGES if case.starved else 256,
        max_num_seqs=16,
        threads=1,
        # Throttle lets nobody in who might have to be preempted.
        schedule_policy="classic" if case.starved else "auto",
    ) as llm:
        for _ in range(2):  # the second time the prefix cache is warm
            results = llm.generate(PROMPTS, PARAMS)
            assert [list(result.prompt_token_ids) for result in results] == PROMPTS
            for result, tokens in zip(results, expected, strict=True):
                output = result.outputs[0]
                assert output.token_ids == tokens
                assert output.finish_reason == ("stop" if tokens[-1] == 257 else "length")
        served = 2 * len(PROMPTS)
        assert eventually(lambda: sum(llm.engine.stats.finished.values()) == served)
        assert (llm.engine.stats.preemptions > 0) == case.starved
        cached = sum(result.num_cached_tokens for result in results)
        assert (cached > 0) == case.caching


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_greedy_output_equals_transformers(case: Case, reference: Reference) -> None:
    check(case, reference)


@pytest.mark.full
@pytest.mark.parametrize("values", list(itertools.product(*VALUES)), ids=str)
def test_greedy_output_equals_transformers_in_every_combination(
    values: tuple[str, int, bool, int, bool], reference: Reference
) -> None:
    check(Case(*values), reference)


def test_the_covering_subset_holds_every_pair_of_values() -> None:
    for (i, first), (j, second) in itertools.combinations(enumerate(VALUES), 2):
        for pair in itertools.product(first, second):
            assert any((case[i], case[j]) == pair for case in COVERING), (i, j, pair)
