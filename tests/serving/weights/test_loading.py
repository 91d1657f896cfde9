"""Which bytes of a checkpoint are read, and what a damaged one is answered with."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serving.config.model import ModelConfig
from serving.errors import ModelError
from serving.models import StageModel, build_stage
from serving.weights import LoadProgress
from serving.weights.checkpoint import Checkpoint, read_header
from serving.weights.dummy import DummyWeights
from serving.weights.progress import ProgressMeter
from serving.weights.slots import WeightSlot
from tests.serving.tiny import make_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("sharded"),
        "qwen2",
        tie_word_embeddings=False,
        max_shard_size="50KB",
    )


@pytest.fixture
def sharded(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def build(folder: Path, first: int = 0, last: int = 4) -> StageModel:
    return build_stage(
        ModelConfig.from_folder(folder),
        range(first, last),
        first=first == 0,
        last=last == 4,
        dtype=torch.float32,
        device="cpu",
    )


def test_a_stage_opens_and_reads_only_its_own(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    opened: set[Path] = set()
    original = Checkpoint.read

    def recording(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        tensor = original(self, name)
        opened.update(self._open)
        return tensor

    monkeypatch.setattr(Checkpoint, "read", recording)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    for first, last in ((0, 1), (1, 3), (3, 4)):
        read.clear()
        opened.clear()
        build(sharded, first, last)
        wanted = {
            name
            for name in weight_map
            if any(f"layers.{layer}." in name for layer in range(first, last))
            or (first == 0 and "embed" in name)
            or (last == 4 and (name == "model.norm.weight" or "lm_head" in name))
        }
        assert set(read) == wanted
        assert len(read) == len(wanted)
        assert opened == {sharded / weight_map[name] for name in wanted}


def test_a_stage_does_without_the_files_of_others(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    own = {file for name, file in weight_map.items() if "layers.1." in name}
    for file in set(weight_map.values()) - own:
        (sharded / file).unlink()
    build(sharded, 1, 2)
    with pytest.raises(ModelError, match=r"weight file .* is missing; complete the download"):
        build(sharded, 0, 2)


def test_one_file_and_shards_give_the_same_weights(sharded: Path, tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", "qwen2", tie_word_embeddings=False)
    assert not (whole / INDEX).exists()
    one, many = build(whole).leaves[1], build(sharded).leaves[1]
    assert one.shapes() == many.shapes()
    with Checkpoint(whole) as a, Checkpoint(sharded) as b:
        for name in one.shapes():
            assert torch.equal(a.read(name), b.read(name))


def test_fused_weights_stand_in_order(sharded: Path) -> None:
    qkv = build(sharded, 2, 3).leaves[1]
    with Checkpoint(sharded) as checkpoint:
        parts = [checkpoint.read(f"model.layers.2.self_attn.{part}_proj.weight") for part in "qkv"]
        bias = [checkpoint.read(f"model.layers.2.self_attn.{part}_proj.bias") for part in "qkv"]
    x = torch.randn(3, 48)
    expected = torch.cat([x @ w.T + b for w, b in zip(parts, bias, strict=True)], dim=1)
    torch.testing.assert_close(qkv(x), expected, atol=1e-5, rtol=1e-5)  # type: ignore[operator]


def _some_shard(folder: Path, tensor: str) -> Path:
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / str(weight_map[tensor])


def test_a_truncated_file_is_named(sharded: Path) -> None:
    shard = _some_shard(sharded, "model.layers.0.mlp.up_proj.weight")
    data = shard.read_bytes()
    for size in (len(data) - 1, 100, 4, 0):
        shard.write_bytes(data[:size])
        with pytest.raises(ModelError, match=f"{shard.name}.*download it again"):
            build(sharded)


@pytest.mark.parametrize(
    "content",
    [
        b"<html>not found</html>",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"a": {}}',
        struct.pack("<Q", 4) + b"\xff\xfe\x00\x00",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n",
    ],
)
def test_a_file_that_is_not_safetensors_is_named(sharded: Path, content: bytes) -> None:
    shard = _some_shard(sharded, "model.layers.0.mlp.up_proj.weight")
    shard.write_bytes(content)
    with pytest.raises(ModelError, match=f"{shard.name}.*download it again"):
        build(sharded)


def test_a_tensor_of_another_shape_is_named(sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"gate_proj.weight has shape .* different models"):
        build(sharded)


def test_a_missing_tensor_is_named(sharded: Path) -> None:
    config = json.loads((sharded / "config.json").read_text())
    changed = {**config, "num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (sharded / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"lack the tensor model\.layers\.4\."):
        build_stage(
            ModelConfig.from_folder(sharded),
            range(4, 5),
            first=False,
            last=True,
            dtype=torch.float32,
            device="cpu",
        )


def test_an_index_that_promises_too_much(sharded: Path) -> None:
    shard = _some_shard(sharded, "model.layers.0.mlp.up_proj.weight")
    tensors = load_file(shard)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file({"other": torch.zeros(1), **tensors}, shard)
    with pytest.raises(ModelError, match=rf"{shard.name} lacks the tensor"):
        build(sharded)


def test_an_index_cannot_point_outside_its_folder(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="not in its folder"):
        build(sharded)


def test_integer_weights_are_refused(sharded: Path) -> None:
    shard = _some_shard(sharded, "model.layers.0.mlp.up_proj.weight")
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, shard)
    with pytest.raises(ModelError, match="stored as I8"):
        build(sharded)


def test_a_folder_without_safetensors(tmp_path: Path, sharded: Path) -> None:
    shutil.copy(sharded / "config.json", tmp_path)
    with pytest.raises(ModelError, match="--load-format dummy"):
        build(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle"):
        build(tmp_path)


def test_a_header_tells_shapes_and_sizes(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(3, 5, dtype=torch.bfloat16)}, file, metadata={"format": "pt"})
    info = read_header(file)["x"]
    assert (info.shape, info.dtype, info.num_bytes) == ((3, 5), "BF16", 30)


def test_progress_ends_at_everything(sharded: Path) -> None:
    seen: list[LoadProgress] = []
    build_stage(
        ModelConfig.from_folder(sharded),
        range(4),
        first=True,
        last=True,
        dtype=torch.float32,
        device="cpu",
        progress=seen.append,
    )
    assert seen[-1].done == seen[-1].total > 0
    assert "0 s left" in str(seen[-1])


def test_the_meter_gives_rate_and_remaining_time() -> None:
    clock = iter([0.0, 0.1, 1.0, 2.0]).__next__
    seen: list[LoadProgress] = []
    meter = ProgressMeter(4000, seen.append, interval=0.5, clock=clock)
    meter.add(500)  # too early to tell
    meter.add(500)
    meter.add(3000)
    assert [one.done for one in seen] == [1000, 4000]
    assert seen[0].rate == 1000.0
    assert seen[0].remaining == 3.0


def test_dummy_weights_follow_seed_and_name_alone() -> None:
    def fill(seed: int, name: str, *shape: int) -> torch.Tensor:
        into = torch.empty(shape)
        DummyWeights(seed, torch.device("cpu")).fill(WeightSlot(name, into))
        return into

    one = fill(0, "a", 1200, 1000)  # longer than the pool
    assert torch.equal(one, fill(0, "a", 1200, 1000))
    assert not torch.equal(one, fill(1, "a", 1200, 1000))
    assert not torch.equal(one, fill(0, "b", 1200, 1000))
    assert int((one == 0).sum()) == 0
    assert len(torch.unique(one, dim=0)) == 1200
    assert one.std().item() == pytest.approx(0.02, rel=0.05)


def test_dummy_norms_are_ones() -> None:
    into = torch.empty(7)
    DummyWeights(3, torch.device("cpu")).fill(WeightSlot("n", into, fill="ones"))
    assert torch.equal(into, torch.ones(7))
