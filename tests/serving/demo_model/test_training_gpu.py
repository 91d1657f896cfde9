"""Training on a GPU: compiled FlexAttention agrees with a dense mask; nothing compiles anew."""

from __future__ import annotations

import copy

import pytest
import torch

from serving.demo_model.training.model import BlockMasks, Decoder, Shape, dense_mask
from serving.demo_model.training.optimiser import Optimiser

pytestmark = pytest.mark.gpu


def batch(seed: int, rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, tokens, generator=generator) < 0.01
    starts[:, 0] = True
    places = torch.arange(tokens).expand(rows, -1)
    positions = places - torch.where(starts, places, 0).cummax(1).values
    ids = torch.randint(0, 1000, (rows, tokens), generator=generator)
    targets = ids.roll(-1, 1)
    made = (ids, positions, starts.cumsum(1), targets, torch.ones(rows, tokens))
    return tuple(tensor.cuda() for tensor in made)


def test_compiled_steps() -> None:
    import torch._dynamo

    torch.manual_seed(0)
    shape = Shape(vocabulary=1024, hidden=128, layers=2, context=1024, intermediate=256)
    model = Decoder(shape).cuda()
    plain = copy.deepcopy(model)
    masks = BlockMasks()
    compiled = torch.compile(model.loss, fullgraph=True)
    optimiser = Optimiser(model)
    losses = []
    for step in range(1, 6):
        ids, positions, documents, targets, weights = batch(step, 4, 1024)
        with torch._dynamo.config.patch(error_on_recompile=step > 2):
            with torch.autocast("cuda", torch.bfloat16):
                whole, _ = compiled(ids, positions, masks(documents), targets, weights)
            (whole / weights.sum()).backward()
        if step == 1:
            with torch.autocast("cuda", torch.bfloat16):
                other, _ = plain.loss(ids, positions, dense_mask(documents), targets, weights)
            (other / weights.sum()).backward()
            torch.testing.assert_close(whole, other, rtol=5e-3, atol=0.0)
            for (name, ours), theirs in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                assert ours.grad is not None
                assert theirs.grad is not None
                error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
                assert error < 0.1, name
        optimiser.step(step, 1.0)
        losses.append(whole.item())
    assert losses[-1] < losses[0]
