"""The demo model: the trained one of this repository, or random weights where it is missing.

The random weights are a Qwen3 of about ten million from a fixed seed, which have learnt nothing:
answers are random words. The file `lectern_demo.json` says so, and the API and the page repeat it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from serving.demo_model.vocabulary import (
    END_OF_TEXT,
    TURN_END,
    build_tokenizer,
    write_tokenizer,
)
from serving.errors import ConfigError

MARKER = "lectern_demo.json"
NAME = "lectern-demo"
#: Where the trained model lies once its weights are part of the repository, and its name.
TRAINED = Path(__file__).with_name("lectern-tiny")
TRAINED_NAME = "lectern-tiny"
CONTEXT = 4096

#: Raise it when the folder's content changes: folders of an older version are made again.
VERSION = 1

_SEED = 20260
_LAYERS = 10
_HIDDEN = 256
_HEADS = 4
_KV_HEADS = 2
_HEAD_DIM = 64
_INTERMEDIATE = 768
_ROUND_VOCABULARY = 64


def demo_model(home: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of the trained model, or one with random weights below `home`.

    Raises ConfigError like `ensure_demo_model`.
    """
    if is_trained():
        return TRAINED
    return ensure_demo_model(home / "demo-model", progress)


def served_name() -> str:
    """The name under which `demo` is served."""
    return TRAINED_NAME if is_trained() else NAME


def is_trained() -> bool:
    """Whether the trained model's weights are there, whole."""
    index = TRAINED / "model.safetensors.index.json"
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError):
        return False
    return all((TRAINED / name).is_file() for name in files)


def ensure_demo_model(folder: Path, progress: Callable[[str], None] | None = None) -> Path:
    """Return `folder`, with the demo model in it; it is made when it is not there yet.

    The folder appears whole or not at all, whatever is killed meanwhile, and two processes may
    ask at once. Raises ConfigError when the place is taken by something else or not writable.
    """
    if _is_current(folder):
        return folder
    if _is_taken(folder):
        raise ConfigError(
            f"{folder} exists and does not hold the demo model; move it away, or choose "
            "another state directory with LECTERN_HOME."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"The demo model cannot be written to {folder.parent}: {error.strerror}; choose "
            "another state directory with LECTERN_HOME."
        ) from error
    try:
        _make(fresh, progress or _silent)
        _put_in_place(fresh, folder)
    except OSError as error:
        raise ConfigError(
            f"The demo model cannot be written to {folder}: {error.strerror}; it takes 50 MB."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def read_marker(folder: Path) -> dict[str, Any]:
    """What `lectern_demo.json` of a model folder says; empty for any other model."""
    try:
        found = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_current(folder: Path) -> bool:
    return bool(read_marker(folder).get("version") == VERSION)


def _is_taken(folder: Path) -> bool:
    if not folder.exists() or (folder / MARKER).is_file():
        return False
    return not folder.is_dir() or any(folder.iterdir())


def _put_in_place(fresh: Path, folder: Path) -> None:
    try:
        # Succeeds when nothing or an empty folder is there.
        os.rename(fresh, folder)
        return
    except OSError:
        if _is_current(folder):  # another process was faster
            return
        if not folder.is_dir():
            raise
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _make(folder: Path, progress: Callable[[str], None]) -> None:
    progress("Making the demo model (random weights, about 40 MB) ...")
    tokenizer = build_tokenizer()
    write_tokenizer(tokenizer, folder, CONTEXT)
    used = tokenizer.get_vocab_size()
    vocabulary = -(-used // _ROUND_VOCABULARY) * _ROUND_VOCABULARY
    ends = [tokenizer.token_to_id(text) for text in (TURN_END, END_OF_TEXT)]
    _write_json(folder / "config.json", _config(vocabulary, ends))
    tensors = dict(_weights(vocabulary))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    parameters = sum(tensor.size for tensor in tensors.values())
    # Last, since this file is what makes the folder count as complete.
    _write_json(
        folder / MARKER,
        {"version": VERSION, "untrained": True, "seed": _SEED, "parameters": parameters},
    )
    progress(f"Made the demo model: {parameters / 1e6:.1f} million random weights.")


def _config(vocabulary: int, ends: list[int | None]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ends,
        "torch_dtype": "float32",
    }


def _weights(vocabulary: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    generator = np.random.default_rng(_SEED)

    def random(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)

    def ones(size: int) -> NDArray[np.float32]:
        return np.ones(size, np.float32)

    query, key = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM
    yield "model.embed_tokens.weight", random(vocabulary, _HIDDEN)
    for layer in range(_LAYERS):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", ones(_HIDDEN)
        yield f"{name}.self_attn.q_proj.weight", random(query, _HIDDEN)
        yield f"{name}.self_attn.k_proj.weight", random(key, _HIDDEN)
        yield f"{name}.self_attn.v_proj.weight", random(key, _HIDDEN)
        yield f"{name}.self_attn.o_proj.weight", random(_HIDDEN, query)
        yield f"{name}.self_attn.q_norm.weight", ones(_HEAD_DIM)
        yield f"{name}.self_attn.k_norm.weight", ones(_HEAD_DIM)
        yield f"{name}.post_attention_layernorm.weight", ones(_HIDDEN)
        yield f"{name}.mlp.gate_proj.weight", random(_INTERMEDIATE, _HIDDEN)
        yield f"{name}.mlp.up_proj.weight", random(_INTERMEDIATE, _HIDDEN)
        yield f"{name}.mlp.down_proj.weight", random(_HIDDEN, _INTERMEDIATE)
    yield "model.norm.weight", ones(_HIDDEN)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _silent(_: str) -> None:
    pass
