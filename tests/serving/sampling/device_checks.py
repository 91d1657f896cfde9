"""The sampler of a GPU against the one in torch, over the life of many sequences."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from serving.core import SamplingParams
from serving.sampling import SampleOutput, Sampler
from serving.sampling.device import DeviceSampler

EOS = 3


def every_kind(seed: int) -> list[SamplingParams]:
    """Each setting alone, and all of them together."""
    return [
        SamplingParams(seed=seed),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=2),
        SamplingParams(seed=seed, top_k=5, temperature=0.7),
        SamplingParams(seed=seed, top_p=0.8),
        SamplingParams(seed=seed, min_p=0.1, logprobs=0),
        SamplingParams(seed=seed, top_k=40, top_p=0.9, min_p=0.01, temperature=1.4),
        SamplingParams(temperature=0.0, frequency_penalty=1.5),
        SamplingParams(seed=seed, repetition_penalty=1.3, presence_penalty=-0.5, top_k=20),
        SamplingParams(seed=seed, min_tokens=4, stop_token_ids=[1, 7], top_p=0.95),
        SamplingParams(
            seed=seed, top_k=30, top_p=0.9, min_p=0.02, logprobs=5, min_tokens=3,
            repetition_penalty=1.1, frequency_penalty=0.4,
        ),
    ]  # fmt: skip


class Pair:
    """A sampler of each kind, given the same sequences and logits."""

    def __init__(self, kernels: ModuleType, device: str, vocab: int, slots: int) -> None:
        self.host = Sampler(vocab, slots, "cpu", [EOS])
        self.device = DeviceSampler(vocab, slots, device, [EOS], kernels)
        self._on = device
        self._last = torch.full((slots + 1,), -1, dtype=torch.int32, device=device)

    def admit(self, slot: int, params: SamplingParams, tokens: list[int], prompt: int) -> None:
        self.host.admit(slot, params, tokens, prompt)
        self.device.admit(slot, params, tokens, prompt)

    def draw(self, logits: Tensor, slots: list[int], positions: list[int]) -> SampleOutput:
        """By the device's sampler."""
        where, places = np.array(slots), np.array(positions)
        numbers = self.device.numbers(where, places)
        before = logits.to(self._on)
        given = before.clone()
        out = self.device.draw(
            given, where, places,
            slots=torch.tensor(slots, dtype=torch.int32, device=self._on),
            temperature=torch.from_numpy(numbers.temperature).to(self._on),
            uniform=torch.from_numpy(numbers.uniform).to(self._on),
            last_tokens=self._last,
            out=torch.full((len(slots),), -1, dtype=torch.int32, device=self._on),
        )  # fmt: skip
        assert torch.equal(given, before), "the caller's logits were changed"
        assert torch.equal(self._last[slots], out.token_ids)
        return out

    def step(self, logits: Tensor, slots: list[int], positions: list[int]) -> list[int]:
        """Both draw; they agree in everything. Returns the tokens."""
        found = self.draw(logits, slots, positions)
        wanted = self.host.sample(logits.float(), torch.tensor(slots), positions)
        tokens = found.token_ids.tolist()
        assert tokens == wanted.token_ids.tolist()
        asked = wanted.logprobs is not None
        assert (found.logprobs is not None) == asked
        if asked:
            for name in ("logprobs", "top_logprobs"):
                torch.testing.assert_close(
                    getattr(found, name).cpu(), getattr(wanted, name), atol=2e-5, rtol=1e-5
                )
            assert found.top_ids is not None
            assert wanted.top_ids is not None
            assert found.top_ids.tolist() == wanted.top_ids.tolist()
        return tokens


def check_lives(kernels: ModuleType, device: str, vocab: int, steps: int, seed: int) -> None:
    """Sequences come, go, are preempted and replayed in other slots, in batches of any order."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    slots = 12
    pair = Pair(kernels, device, vocab, slots)
    live: dict[int, tuple[SamplingParams, list[int], int]] = {}
    for _ in range(steps):
        for slot in range(slots):
            if slot in live and source.random() < 0.15:
                params, tokens, prompt = live.pop(slot)
                pair.host.release(slot)
                pair.device.release(slot)
                if source.random() < 0.5:
                    other = source.choice([s for s in range(slots) if s not in live])
                    pair.admit(other, params, tokens, prompt)
                    live[other] = (params, tokens, prompt)
        for slot in range(slots):
            if slot not in live and source.random() < 0.8:
                params = source.choice(every_kind(source.randrange(1000)))
                prompt = source.randint(1, 30)
                tokens = [source.randrange(vocab) for _ in range(prompt)]
                pair.admit(slot, params, tokens, prompt)
                live[slot] = (params, tokens, prompt)
        # Distinct values: which of several equal logits is named is left open.
        logits = torch.stack([torch.randperm(vocab) for _ in live]) * (12.0 / vocab)
        logits += torch.rand(len(live), 1) * 3
        order = source.sample(sorted(live), len(live))
        positions = [len(live[slot][1]) for slot in order]
        for slot, token in zip(order, pair.step(logits, order, positions), strict=True):
            live[slot][1].append(token)


def check_neighbours(kernels: ModuleType, device: str, dtype: torch.dtype, vocab: int) -> None:
    """Every kind of row alone gives what it gives in a crowd, in half precision too."""
    torch.manual_seed(7)
    every = every_kind(9)
    logits = (torch.randn(len(every), vocab) * 3).to(dtype)
    crowd = Pair(kernels, device, vocab, 16)
    for slot, params in enumerate(every):
        crowd.admit(slot + 2, params, [5, 6, 5], 3)
    places = list(range(2, len(every) + 2))
    together = [
        crowd.draw(logits, places, [position] * len(every)).token_ids.tolist()
        for position in (3, 4)
    ]
    for row, params in enumerate(every):
        alone = Pair(kernels, device, vocab, 1)
        alone.admit(0, params, [5, 6, 5], 3)
        for tokens, position in zip(together, (3, 4), strict=True):
            out = alone.draw(logits[row : row + 1], [0], [position])
            assert out.token_ids.tolist() == [tokens[row]], params


def check_warm_up(kernels: ModuleType, device: str) -> None:
    """Leaves nothing behind, with one slot and with several."""
    for slots in (1, 3):
        pair = Pair(kernels, device, 300, slots)
        pair.device.warm_up(torch.randn(slots, 300, device=device))
        pair.admit(0, SamplingParams(temperature=0.0), [1], 1)
        logits = torch.randn(1, 300)
        assert pair.step(logits, [0], [1]) == [int(logits.argmax())]
