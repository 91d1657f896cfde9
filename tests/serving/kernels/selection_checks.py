"""What filters, draws, penalties and log probabilities on the device must do.

In the interpreter and on a GPU; the reference is `serving.sampling` in torch on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import ModuleType

import torch
from torch import Tensor

from serving.sampling.draw import draw
from serving.sampling.filters import logit_floor

Settings = tuple[float, int, float, float]  # temperature, top_k, top_p, min_p

MIXED: list[Settings] = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 50, 0.9, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.3, 0, 0.5, 0.0),
    (0.9, 0, 1.0, 0.1),
    (1.5, 40, 0.8, 0.05),
    (1.0, 3, 0.99, 0.3),
    (1.0, 0, 0.95, 0.02),
    (100.0, 0, 0.97, 0.0),
    (1e-4, 0, 0.9, 0.0),
    (1.0, 300, 1.0, 0.0),
    (1.0, 4000, 0.6, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 0.999999, 0.0),
    (1.0, 7, 1.0, 1.0),
]

KINDS = (
    "flat", "usual", "peaked", "negative", "equal", "lone", "few", "tied", "zeros", "near", "tiny",
    "far",
)  # fmt: skip


def _rows(vocab: int, source: torch.Generator) -> dict[str, Tensor]:
    """Rows of every kind that a cut can meet."""
    noise = torch.randn(vocab, generator=source)
    lone = torch.full((vocab,), -torch.inf)
    lone[vocab // 3] = -2.5
    few = torch.full((vocab,), -torch.inf)
    some = torch.randperm(vocab, generator=source)[:4]
    few[some] = torch.tensor([1.0, 1.0, 0.5, -3.0])[: len(some)]
    tied = (noise * 2).round()
    zeros = torch.where(noise > 0, 0.0, -0.0)
    zeros[vocab // 2 :] = noise[vocab // 2 :] - 3
    near = 5.0 + torch.arange(vocab) % 97 * 2.0**-21
    return {
        "flat": noise * 0.1,
        "usual": noise * 3,
        "peaked": noise * 2 + 25 * (noise > noise.topk(min(3, vocab)).values[-1]),
        "negative": noise - 40,
        "equal": torch.full((vocab,), 0.5),
        "lone": lone,
        "few": few,
        "tied": tied,
        "zeros": zeros,
        "near": near,
        "tiny": noise * 1e-38,
        "far": torch.where(noise > 1.5, noise * 20, torch.tensor(-1e30)),
    }


def _tables(every: list[Settings], vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    temperature, k, p, min_p = (torch.tensor(values) for values in zip(*every, strict=True))
    k = torch.where((k > 0) & (k < vocab), k, 0).to(torch.int32)
    return temperature.float(), k, p.float(), min_p.float()


def reference_floors(
    logits: Tensor, temperature: Tensor, k: Tensor, p: Tensor, min_p: Tensor
) -> Tensor:
    """Row by row, as the sampler on the CPU has them."""
    floors = torch.full((len(logits),), -torch.inf)
    for row in range(len(logits)):
        one = slice(row, row + 1)
        if float(temperature[row]) > 0:
            # The best logit is taken away first: cold rows would lose their last digits otherwise.
            mass = torch.softmax((logits[one] - logits[one].max()) / temperature[one], -1)
            floors[one] = logit_floor(
                logits[one], mass, temperature[one], k[one].long(), p[one], min_p[one], int(k[row])
            )
    return floors


def _margin(logits: Tensor, temperature: float, k: int, p: float) -> float:
    """How far the mass p lies from the nearest place between two tokens, as a share."""
    ordered = logits.double().sort(descending=True).values
    ordered = ordered[:k] if k else ordered
    ends = ((ordered - ordered[0]) / temperature).exp().cumsum(0)
    return float((ends / ends[-1] - p).abs().min())


def check_floors(
    kernels: ModuleType, device: str, dtype: torch.dtype, vocab: int, kinds: Collection[str] = KINDS
) -> None:
    """Kinds of rows with every mix of filters, some in a second batch of another order."""
    source = torch.Generator().manual_seed(vocab)
    for name, row in _rows(vocab, source).items():
        if name not in kinds:
            continue
        count = len(MIXED)
        logits = row.to(dtype).expand(count, vocab).contiguous()
        temperature, k, p, min_p = _tables(MIXED, vocab)
        wide = logits.float()
        expected = reference_floors(wide, temperature, k, p, min_p)
        slots = torch.randperm(count + 5, generator=source)[:count]

        def table(values: Tensor, at: Tensor = slots, size: int = count + 5) -> Tensor:
            full = torch.full((size,), 77, dtype=values.dtype)
            full[at] = values
            return full.to(device)

        tables = (table(k), table(p), table(temperature * min_p.log()))
        found = kernels.filter_floors(
            logits.to(device), temperature.to(device), slots.to(torch.int32).to(device), *tables
        ).floor.cpu()
        if name == "usual":
            back = torch.arange(count - 1, -1, -1)
            again = kernels.filter_floors(
                logits.to(device), temperature[back].to(device),
                slots[back].to(torch.int32).to(device), *tables,
            )  # fmt: skip
            assert torch.equal(again.floor.cpu()[back], found)
        assert not found.isnan().any()
        for at in range(count):
            if float(found[at]) == float(expected[at]):
                continue
            kept, wanted = wide[at] >= found[at], wide[at] >= expected[at]
            mass = torch.softmax(wide[at].double() / float(temperature[at]), -1)
            if not bool(((kept ^ wanted) & (mass > 0)).any()):
                continue  # they differ about tokens that have no mass
            margin = _margin(wide[at], float(temperature[at]), int(k[at]), float(p[at]))
            assert margin < 3e-6, (name, MIXED[at], float(found[at]), float(expected[at]))


def drawn(
    kernels: ModuleType,
    device: str,
    logits: Tensor,
    every: list[Settings],
    uniforms: list[Tensor],
) -> list[Tensor]:
    """Tokens [R] of rows [R, V] with these settings, for each set of uniform numbers [R]."""
    rows, vocab = logits.shape
    temperature, k, p, min_p = (table.to(device) for table in _tables(every, vocab))
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    moved = logits.to(device)
    floors = kernels.filter_floors(moved, temperature, slots, k, p, temperature * min_p.log())
    tokens = []
    for uniform in uniforms:
        last = torch.full((rows,), -1, dtype=torch.int32, device=device)
        out = torch.full((rows,), -1, dtype=torch.int32, device=device)
        kernels.draw_tokens(moved, temperature, uniform.to(device), slots, last, out, floors)
        assert torch.equal(last, out)
        tokens.append(out.cpu().long())
    return tokens


def check_draws(
    kernels: ModuleType, device: str, dtype: torch.dtype, vocab: int, kinds: Collection[str] = KINDS
) -> None:
    """Tokens are those of the inverse CDF over what the reference keeps, and never others."""
    source = torch.Generator().manual_seed(vocab)
    for name, row in _rows(vocab, source).items():
        if name not in kinds:
            continue
        logits = row.to(dtype).expand(len(MIXED), vocab)
        temperature, k, p, min_p = _tables(MIXED, vocab)
        wide = logits.float()
        floors = reference_floors(wide, temperature, k, p, min_p)
        warm = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
        mass = torch.softmax(((wide - wide.amax(-1, keepdim=True)) / warm).double(), -1)
        kept = mass * (wide >= floors.unsqueeze(1))
        numbers = (2.0**-54, float(torch.rand(1, generator=source)), 1 - 2.0**-53)
        uniforms = [torch.full((len(MIXED),), u, dtype=torch.float64) for u in numbers]
        found = drawn(kernels, device, logits, MIXED, uniforms)
        for u, uniform, tokens in zip(numbers, uniforms, found, strict=True):
            expected = draw(kept.float(), uniform)
            expected = torch.where(temperature > 0, expected, wide.argmax(-1))
            for at, (token, wanted) in enumerate(zip(tokens, expected, strict=True)):
                case = (name, MIXED[at], u)
                assert 0 <= int(token) < vocab, case
                margin = _margin(wide[at], float(warm[at]), int(k[at]), float(p[at]))
                if float(p[at]) < 1.0 and margin < 3e-6:
                    continue  # rounding decides about a token
                assert kept[at, token] > 0, case
                if int(token) != int(wanted):
                    # Rounding of sums may reach the next token, no further.
                    low, high = sorted((int(token), int(wanted)))
                    between = float(kept[at, low + 1 : high].sum() / kept[at].sum())
                    ends = kept[at].cumsum(0) / kept[at].sum()
                    assert between < 1e-5, case
                    assert abs(float(ends[low]) - u) < 1e-5, case


def check_distribution(kernels: ModuleType, device: str, settings: Settings, rows: int) -> None:
    """Counts of tokens over many uniform numbers follow the filtered distribution."""
    vocab = 20
    source = torch.Generator().manual_seed(5)
    logits = torch.randn(1, vocab, generator=source)
    uniform = torch.rand(rows, dtype=torch.float64, generator=source)
    temperature, k, p, min_p = _tables([settings], vocab)
    floor = reference_floors(logits, temperature, k, p, min_p)
    on = {"device": device}
    slot = torch.zeros(rows, dtype=torch.int32, **on)
    tables = [table.to(device) for table in (k, p, temperature * min_p.log())]
    found = kernels.filter_floors(logits.to(device), temperature.to(device), slot[:1], *tables)
    floors = kernels.Floors(
        found.floor.expand(rows).contiguous(), found.maxima.expand(rows, -1, -1).contiguous()
    )
    tokens = torch.empty(rows, dtype=torch.int32, **on)
    kernels.draw_tokens(
        logits.expand(rows, vocab).to(device), temperature.expand(rows).contiguous().to(device),
        uniform.to(device), slot, torch.empty(1, dtype=torch.int32, **on), tokens, floors,
    )  # fmt: skip
    scores = logits[0].double() / float(temperature[0])
    shares = torch.softmax(scores.masked_fill(logits[0] < floor, -torch.inf), -1)
    counts = torch.bincount(tokens.cpu(), minlength=vocab).double()
    expected = shares * rows
    held = expected > 0
    assert int(counts[~held].sum()) == 0, "a token that the filters exclude was drawn"
    assert float((((counts - expected) ** 2)[held] / expected[held]).sum()) < 50


def check_plain_rows(kernels: ModuleType, device: str, dtype: torch.dtype, vocab: int) -> None:
    """A row without filters gets the same token beside rows that have some."""
    source = torch.Generator().manual_seed(8)
    rows = 24
    logits = (torch.randn(rows, vocab, generator=source) * 2).to(dtype)
    uniform = torch.rand(rows, dtype=torch.float64, generator=source)
    every = [MIXED[0] if row % 2 else MIXED[row % len(MIXED)] for row in range(rows)]
    mixed = drawn(kernels, device, logits, every, [uniform])[0]
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    out = torch.empty(rows, dtype=torch.int32, device=device)
    temperature = torch.tensor([settings[0] for settings in every], device=device)
    kernels.draw_tokens(logits.to(device), temperature, uniform.to(device), slots, out.clone(), out)
    assert torch.equal(out.cpu().long()[1::2], mixed[1::2])


def check_logprobs(kernels: ModuleType, device: str, dtype: torch.dtype, vocab: int) -> None:
    """Against a stable full sort; rows that did not ask hold zeros."""
    source = torch.Generator().manual_seed(vocab)
    rows = [row.to(dtype) for row in _rows(vocab, source).values()]
    logits = torch.stack([*rows, rows[1]])
    count = len(logits)
    width = min(20, vocab)
    slots = torch.randperm(count, generator=source).to(torch.int32)
    alternatives = torch.full((count,), width, dtype=torch.int32)
    alternatives[slots[-1]] = 0
    tokens = torch.randint(vocab, (count,), generator=source, dtype=torch.int32)
    moved = [tensor.to(device) for tensor in (logits, tokens, slots, alternatives)]
    for wanted in sorted({0, min(3, width), width}):
        found = [part.cpu() for part in kernels.token_logprobs(*moved, wanted)]
        logprobs, top_ids, top_logprobs = found
        assert top_ids.shape == top_logprobs.shape == (count, wanted)
        scores = torch.log_softmax(logits.double(), -1)
        ordered = logits.float().sort(dim=-1, descending=True, stable=True).indices
        for at in range(count - 1):
            _same(logprobs[at], scores[at, tokens[at].long()])
            best = ordered[at, :wanted]
            real = logits[at, best] > -torch.inf
            assert torch.equal(top_ids[at][real].long(), best[real])
            _same(top_logprobs[at], scores[at, best])
        for part in found:
            assert not part[-1].any()


def _same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-6)


def check_penalties(kernels: ModuleType, device: str) -> None:
    """Against plain arithmetic; tables longer than a block, entries in any order."""
    source = torch.Generator().manual_seed(2)
    vocab, entries = 3000, [5, 1300, 1, 0]
    ids = torch.stack([torch.randperm(vocab, generator=source)[:1400] for _ in entries])
    counts = torch.randint(3, ids.shape, generator=source).float()
    lengths = torch.tensor(entries)
    factors = torch.tensor([[1.3, 0.5, 0.2], [0.7, -1.0, 0.1], [1.0, 0.0, 2.0], [2.0, 2.0, 2.0]])
    logits = torch.randn(6, vocab, generator=source)
    at, chosen = torch.tensor([4, 0, 5, 2]), torch.tensor([1, 3, 0, 2])
    expected = logits.clone()
    for row, entry in zip(at.tolist(), chosen.tolist(), strict=True):
        for place in range(entries[entry]):
            token, count = int(ids[entry, place]), float(counts[entry, place])
            repetition, presence, frequency = factors[entry].tolist()
            x = float(logits[row, token])
            x = x / repetition if x > 0 else x * repetition
            expected[row, token] = x - frequency * count - presence * (count > 0)
    on: Callable[[Tensor], Tensor] = lambda tensor: tensor.to(device)  # noqa: E731
    table = [on(lengths.clone()), on(ids.clone()), on(counts.clone())]
    small = [on(tensor.to(torch.int32)) for tensor in (at, chosen)]
    moved = on(logits)
    kernels.penalize(moved, *small, *table, on(factors), max(entries))
    torch.testing.assert_close(moved.cpu(), expected, atol=1e-5, rtol=1e-5)
    # One token that the table has in its second block, one that it has not, one in an empty row.
    fresh = sorted(set(range(vocab)) - set(ids[0].tolist()))[0]
    tokens = torch.tensor([7, 8, 9, int(ids[1, 1200]), fresh, 11], dtype=torch.int32)
    order = torch.tensor([3, 4, 5], dtype=torch.int32), torch.tensor([1, 0, 3], dtype=torch.int32)
    kernels.count_tokens(on(tokens), on(order[0]), on(order[1]), *table)
    found_lengths, found_ids, found_counts = (part.cpu() for part in table)
    assert found_lengths.tolist() == [6, 1300, 1, 1]
    counts[1, 1200] += 1
    counts[0, 5] = counts[3, 0] = 1
    ids[0, 5], ids[3, 0] = fresh, 11
    assert torch.equal(found_ids, ids)
    assert torch.equal(found_counts, counts)
    kernels.ban_tokens(
        moved, on(torch.tensor([0, 5], dtype=torch.int32)), on(torch.tensor([2, 9]).int())
    )
    expected[0, 2] = expected[5, 9] = -math.inf
    torch.testing.assert_close(moved.cpu(), expected, atol=1e-5, rtol=1e-5)
