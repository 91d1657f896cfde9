"""Writes a trained model as a Hugging Face folder: bf16 safetensors in shards, tokenizer, card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from serving.demo_model.training.collect import SOURCES
from serving.demo_model.training.model import Decoder, Shape
from serving.demo_model.training.prompts import END_OF_TEXT, TURN_END

LARGEST_SHARD = 15_000_000
#: How far the training came; `--start-from` reads it.
PROGRESS = "training.json"
CARD = Path(__file__).with_name("card.md")
_READ = {
    "html": "documentation", "po": "messages and translations",
    "properties": "messages and translations", "typescript": "messages and translations",
    "wordnet": "synonyms, definitions", "unihan": "meanings of characters",
}  # fmt: skip


def export(
    model: Decoder, tokenizer: Path, folder: Path, progress: dict[str, Any] | None = None
) -> Path:
    """Write the folder and return it; what was there of an earlier export is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    tensors = {
        f"model.{name}": parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    shards = _shards(tensors)
    places = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    _write(folder / "model.safetensors.index.json",
           {"metadata": {"total_size": size}, "weight_map": places})  # fmt: skip
    ids = special_tokens(tokenizer)
    _write(folder / "config.json", model.shape.config(ids))
    _write(folder / "generation_config.json",
           {"do_sample": False, "eos_token_id": [ids[TURN_END], ids[END_OF_TEXT]],
            "pad_token_id": ids[END_OF_TEXT]})  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    if progress is not None:
        _write(folder / PROGRESS, progress)
    (folder / "README.md").write_text(card(model), "utf-8")
    return folder


def card(model: Decoder, figures: str = "Not measured yet.") -> str:
    """Return the model card: sizes, packages with their licences, figures."""
    rows = ["| package | licence | read of it |", "| --- | --- | --- |"]
    rows += [f"| {s.package} | {s.licence} | {_READ[s.kind]} |" for s in SOURCES]
    text = CARD.read_text("utf-8").replace("@SOURCES@", "\n".join(rows))
    parameters = sum(p.numel() for p in model.parameters())
    return text.replace("@PARAMETERS@", f"{parameters:,}").replace("@FIGURES@", figures)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of an exported folder under the decoder's names, and its progress."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            weights[name.removeprefix("model.")] = tensor.float()
    file = folder / PROGRESS
    return weights, json.loads(file.read_text()) if file.is_file() else {}


def shape_of(folder: Path) -> Shape:
    """Return the shape that an exported folder's config.json tells."""
    c = json.loads((folder / "config.json").read_text())
    return Shape(
        c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"],
        c["num_key_value_heads"], c["head_dim"], c["intermediate_size"],
        c["max_position_embeddings"], c["rope_theta"], c["rms_norm_eps"],
    )  # fmt: skip


def special_tokens(tokenizer: Path) -> dict[str, int]:
    """Return the ids of the special tokens of a tokenizer's folder."""
    added = json.loads((tokenizer / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > LARGEST_SHARD:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    return shards


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
