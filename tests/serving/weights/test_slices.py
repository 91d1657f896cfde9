"""A rank reads its own part of each tensor, and random weights are parts of the whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from serving.config.model import ModelConfig
from serving.errors import ModelError
from serving.models import StageModel, build_stage
from serving.weights import LoadProgress, Region
from serving.weights.checkpoint import Checkpoint
from serving.weights.dummy import DummyWeights
from serving.weights.slots import WeightSlot
from tests.serving.tiny import make_checkpoint


class _Rank:
    """A rank that only loads."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def build(folder: Path, rank: int, ranks: int, seen: list[LoadProgress] | None = None) -> Any:
    group: Any = _Rank(rank, ranks)
    config = ModelConfig.from_folder(folder)
    stage: StageModel = build_stage(
        config,
        range(4),
        first=True,
        last=True,
        dtype=torch.float32,
        device="cpu",
        group=group,
        progress=None if seen is None else seen.append,
    )
    return stage


def test_ranks_read_each_byte_once_but_norms_and_biases_of_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(
        tmp_path, "llama", vocab_size=323, attention_bias=True, mlp_bias=True, num_hidden_layers=4
    )
    read: dict[str, list[Region]] = {}
    whole: list[str] = []
    read_region, read_whole = Checkpoint.read_region, Checkpoint.read

    def recording_region(self: Checkpoint, name: str, region: Region) -> torch.Tensor:
        read.setdefault(name, []).append(region)
        tensor = read_region(self, name, region)
        assert tuple(tensor.shape) == tuple(map(len, region))
        return tensor

    def recording_whole(self: Checkpoint, name: str) -> torch.Tensor:
        whole.append(name)
        return read_whole(self, name)

    monkeypatch.setattr(Checkpoint, "read_region", recording_region)
    monkeypatch.setattr(Checkpoint, "read", recording_whole)
    for rank in range(2):
        seen: list[LoadProgress] = []
        build(tmp_path, rank, 2, seen)
        assert seen[-1].done == seen[-1].total > 0
    assert all("norm" in name for name in whole)
    with Checkpoint(tmp_path) as checkpoint:
        for name, regions in read.items():
            shape = checkpoint.info(name).shape
            cells = [
                {(row, column) for row in region[0] for column in (*region[1:], range(1))[0]}
                for region in regions
            ]
            if name.endswith(("o_proj.bias", "down_proj.bias")):
                assert len(cells) == 1, "only one rank may bring the bias of a sum"
            else:
                assert len(cells) == 2
                assert not cells[0] & cells[1]
            assert sum(map(len, cells)) == torch.Size(shape).numel()


def test_weights_of_ranks_are_parts_of_the_whole(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2", tie_word_embeddings=False, num_attention_heads=6,
                    num_key_value_heads=2)  # fmt: skip
    x = torch.randn(3, 48)
    with Checkpoint(tmp_path) as checkpoint:
        name = "model.layers.1.self_attn"
        parts = {
            part: (
                checkpoint.read(f"{name}.{part}_proj.weight"),
                checkpoint.read(f"{name}.{part}_proj.bias"),
            )
            for part in "qkv"
        }
        head = checkpoint.read("lm_head.weight")
    for rank in range(2):
        stage = build(tmp_path, rank, 2)
        leaves = {next(iter(leaf.shapes())): leaf for leaf in stage.leaves}
        qkv = leaves[f"{name}.q_proj.weight"]
        # 6 query heads and 2 key-value heads of 8.
        own = {"q": slice(24 * rank, 24 * rank + 24)} | dict.fromkeys(
            "kv", slice(8 * rank, 8 * rank + 8)
        )
        expected = torch.cat([x @ w[own[p]].T + b[own[p]] for p, (w, b) in parts.items()], dim=1)
        torch.testing.assert_close(qkv(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            leaves["lm_head.weight"](x), x @ head[160 * rank : 160 * rank + 160].T
        )


def test_shapes_are_checked_against_the_whole_model(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace('"intermediate_size": 88', '"intermediate_size": 96')
    )
    with pytest.raises(ModelError, match=r"shape \[88, 48\] where config.json asks for \[96, 48\]"):
        build(tmp_path, 0, 2)


@pytest.mark.parametrize(
    ("shape", "region"),
    [
        ((1200, 1000), (range(600, 1200), range(1000))),
        ((1200, 1000), (range(1200), range(250, 500))),
        ((1200, 1000), (range(3, 1199), range(999, 1000))),
        ((40,), (range(10, 20),)),
        ((3, 900_000), (range(1, 3), range(450_000, 900_000))),
        ((7, 5), (range(7), range(5))),
    ],
)
def test_random_parts_are_those_of_the_whole(shape: tuple[int, ...], region: Region) -> None:
    """Also beyond the length of the pool of numbers, which is a little over a million."""
    weights = DummyWeights(7, torch.device("cpu"))
    whole, part = torch.empty(shape), torch.empty(tuple(map(len, region)))
    weights.fill(WeightSlot("w", whole))
    weights.fill(WeightSlot("w", part, region=region, shape=shape))
    assert torch.equal(part, whole[tuple(slice(r.start, r.stop) for r in region)])
