"""What a checkpoint folder says about its model: architecture, sizes, positions, stop tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from serving.config.fields import Fields
from serving.config.rope import RopeConfig, read_rope
from serving.errors import ModelError

__all__ = ["ARCHITECTURES", "Family", "ModelConfig"]

Family = Literal["llama", "qwen2", "qwen3", "mistral"]

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """One model, as its folder describes it. Sizes are in elements, positions in tokens.

    `sliding_windows` holds one entry a layer: None for full attention, or w when a token sees
    itself and the w - 1 tokens before it. `dtype` is the checkpoint's own.
    """

    folder: Path
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str

    @property
    def context_length(self) -> int:
        """The longest sequence the model is made for: yarn stretches its original context."""
        if self.rope.kind == "yarn":
            stretched = int(self.rope.original_context * self.rope.factor)
            return max(self.max_position_embeddings, stretched)
        return self.max_position_embeddings

    def sliding_window(self, layer: int) -> int | None:
        """The window of one layer, None for full attention."""
        return self.sliding_windows[layer]

    def kv_shape(self, num_pages: int, page_size: int) -> tuple[int, int, int, int, int]:
        """The shape of one layer's KV tensor: [pages, 2, page_size, kv_heads, head_dim]."""
        return (num_pages, 2, page_size, self.num_kv_heads, self.head_dim)

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read config.json and generation_config.json of a Hugging Face checkpoint folder.

        Raises ModelError, one sentence, for whatever this engine cannot serve.
        """
        folder = Path(path)
        raw = _read_config(folder)
        where = str(folder / "config.json")
        family = _family(raw, where)
        _refuse_unserved(raw, where)
        config = _sizes(cls, raw, where, folder, family)
        return _with_generation_config(config)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise ModelError(
            f"The model folder {folder} does not exist; give the path of a Hugging Face "
            "checkpoint folder (config.json and *.safetensors)."
        )
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise ModelError(
                f"{folder} is a GGUF file, which is not supported; give a Hugging Face "
                "checkpoint folder with safetensors files."
            )
        raise ModelError(f"{folder} is a file; give the checkpoint folder that contains it.")
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                f"{folder} holds an adapter (LoRA), not a model; merge it into its base model "
                "and give that folder."
            )
        if any(folder.glob("*.gguf")):
            raise ModelError(
                f"{folder} holds GGUF files, which are not supported; give a Hugging Face "
                "checkpoint folder with safetensors files."
            )
        if (folder / "params.json").exists():
            raise ModelError(
                f"{folder} holds a checkpoint in its maker's own format (params.json); give the "
                "Hugging Face version of it, with config.json."
            )
        raise ModelError(f"{folder} holds no config.json; it is not a checkpoint folder.")
    return read_json_object(file)


def read_json_object(file: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises ModelError that names the file."""
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON ({error}); download it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} must hold a JSON object; download it again.")
    return found


def _family(raw: dict[str, Any], where: str) -> Family:
    supported = ", ".join(ARCHITECTURES)
    names = raw.get("architectures") or []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list):
        raise ModelError(f"{where}: architectures must be a list of names, not {names!r}.")
    if names:
        family = ARCHITECTURES.get(str(names[0]))
        if family is None:
            raise ModelError(
                f"{where}: architecture {names[0]} is not supported; supported are {supported}."
            )
        return family
    kind = raw.get("model_type")
    for family in ARCHITECTURES.values():
        if kind == family:
            return family
    if kind is None:
        raise ModelError(
            f"{where} names neither an architecture nor a model type; supported are {supported}."
        )
    raise ModelError(f"{where}: model type {kind!r} is not supported; supported are {supported}.")


def _refuse_unserved(raw: dict[str, Any], where: str) -> None:
    """Refuse what would otherwise be served wrongly."""
    quantised = raw.get("quantization_config") or raw.get("compression_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"{where}: the checkpoint is quantised ({method or 'unknown method'}), which is not "
            "supported; give the bfloat16 or float32 version of the model."
        )
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(name):
            raise ModelError(
                f"{where}: mixture-of-experts models ({name}) are not supported; supported are "
                f"the dense {', '.join(ARCHITECTURES)}."
            )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{where}: hidden_act {activation!r} is not supported; only silu is.")


def _sizes(
    cls: type[ModelConfig], raw: dict[str, Any], where: str, folder: Path, family: Family
) -> ModelConfig:
    fields = Fields(raw, where)
    heads = fields.count("num_attention_heads", None)
    hidden = fields.count("hidden_size", None)
    layers = fields.count("num_hidden_layers", None)
    # A missing key means the family's own default, a null one means "as many as heads".
    kv_default = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(family, heads)
    missing_kv = kv_default if "num_key_value_heads" not in raw else heads
    kv_heads = fields.count("num_key_value_heads", missing_kv)
    if raw.get("head_dim") is None and family == "qwen3" and "head_dim" not in raw:
        head_dim = 128
    elif raw.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"{where}: hidden_size {hidden} is not a multiple of the {heads} attention heads "
            "and no head_dim is given."
        )
    else:
        head_dim = fields.count("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(
            f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads; "
            "the first must be a multiple of the second."
        )
    if head_dim % 2:
        raise ModelError(f"{where}: head_dim {head_dim} is odd, and RoPE turns pairs.")
    max_positions = fields.count("max_position_embeddings", None)
    attention_bias = fields.flag("attention_bias", False)
    own_tokens = family in ("llama", "mistral")
    bos = fields.token_ids("bos_token_id", (1,) if own_tokens else ())
    return cls(
        folder=folder,
        family=family,
        vocab_size=fields.count("vocab_size", None),
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size", None),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=read_rope(raw, max_positions, where),
        max_position_embeddings=max_positions,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or (family != "mistral" and attention_bias),
        output_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and fields.flag("mlp_bias", False),
        qk_norm=family == "qwen3",
        sliding_windows=_windows(fields, family, layers),
        eos_token_ids=fields.token_ids("eos_token_id", (2,) if own_tokens else ()),
        bos_token_id=bos[0] if bos else None,
        dtype=_dtype(raw, where),
    )


def _windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """One window a layer. Mistral: everywhere; Qwen: where its settings say; Llama: nowhere."""
    raw, where = fields.values, fields.where
    kinds = raw.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) < layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in kinds)
    ):
        raise ModelError(
            f"{where}: layer_types must name full_attention or sliding_attention for each of "
            f"the {layers} layers; other kinds of attention are not supported."
        )
    window: int | None = None
    if "sliding_window" not in raw:
        window = None if family == "llama" else 4096
    elif raw["sliding_window"] is not None:
        window = fields.count("sliding_window", None)
    if family == "llama":
        if window is not None or (kinds and "sliding_attention" in kinds[:layers]):
            raise ModelError(
                f"{where}: sliding-window attention is not part of the Llama architecture, so "
                "this checkpoint cannot be served as its makers meant it."
            )
        return (None,) * layers
    if family == "mistral":
        wanted = "full_attention" if window is None else "sliding_attention"
        if kinds and any(kind != wanted for kind in kinds[:layers]):
            raise ModelError(
                f"{where}: layer_types and sliding_window contradict each other; Mistral uses "
                "one window in every layer."
            )
        return (window,) * layers
    if not fields.flag("use_sliding_window", False):
        window = None
    if kinds is not None:
        if window is None and "sliding_attention" in kinds[:layers]:
            raise ModelError(
                f"{where}: layer_types asks for sliding attention, but use_sliding_window is "
                "off or sliding_window is missing."
            )
        return tuple(window if kind == "sliding_attention" else None for kind in kinds[:layers])
    full = fields.whole("max_window_layers", 28)
    return tuple(window if layer >= full else None for layer in range(layers))


def _dtype(raw: dict[str, Any], where: str) -> str:
    found = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(found).removeprefix("torch.")
    if name not in _DTYPES:
        raise ModelError(
            f"{where}: dtype {found!r} is not supported; supported are {', '.join(_DTYPES)}."
        )
    return name


def _with_generation_config(config: ModelConfig) -> ModelConfig:
    """The stop tokens of generation_config.json win over those of config.json."""
    file = config.folder / "generation_config.json"
    if not file.is_file():
        return config
    fields = Fields(read_json_object(file), str(file))
    ids = fields.token_ids("eos_token_id", config.eos_token_ids)
    return replace(config, eos_token_ids=ids or config.eos_token_ids)
