"""Small random checkpoints of every family, made with transformers, and a tokenizer for them.

Weights are drawn wide enough that greedy output wanders over the vocabulary instead of repeating
one token, and that the best and second logits of a step lie well apart: a comparison token by
token then tests the arithmetic and not the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

__all__ = [
    "FAMILIES",
    "LLAMA3_ROPE",
    "YARN_ROPE",
    "linear_rope",
    "load_reference",
    "make_checkpoint",
    "make_soft_checkpoint",
    "make_tokenizer",
]

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")

_CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
}

# Scalings whose effect shows within the few hundred positions of a test.
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


def linear_rope(factor: float = 2.0) -> dict[str, Any]:
    """RoPE settings of kind linear."""
    return {"rope_type": "linear", "rope_theta": 10_000.0, "factor": factor}


_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}

# What sets each family apart from the others, beyond its architecture.
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "num_attention_heads": 5, "num_key_value_heads": 5},
    "mistral": {"sliding_window": 40},
}


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    with_tokenizer: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of one of FAMILIES into `folder` (made if missing); returns it.

    `overrides` go to the transformers configuration: sizes (`num_hidden_layers=3`),
    `rope_parameters=YARN_ROPE`, `tie_word_embeddings`, `sliding_window`, `eos_token_id` and so on.
    `max_shard_size` such as "40KB" splits the weights over files with an index. With a tokenizer
    the folder also holds `make_tokenizer`'s files; its 320 ids are the default vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**_SIZES, **_FAMILY_SIZES[family], **overrides}
    config = _CONFIGS[family](**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
                elif "embed" in name or "lm_head" in name:
                    # A tied matrix of full width would make every token predict itself.
                    parameter.normal_(0.0, 0.3 if config.tie_word_embeddings else 1.0)
                else:
                    parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if with_tokenizer:
        make_tokenizer(folder)
    return folder


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same checkpoint in transformers, for comparison."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def greedy_answers(
    folder: Path, prompts: Sequence[list[int]], count: int | Sequence[int]
) -> list[list[int]]:
    """What transformers answers in float32 with up to `count` tokens, one number for all or one for
    each prompt; it stops at its end token.
    """
    model = load_reference(folder)
    answers = []
    counts = [count] * len(prompts) if isinstance(count, int) else count
    for prompt, most in zip(prompts, counts, strict=True):
        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(found[0, len(prompt) :].tolist())
    return answers


_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def make_tokenizer(folder: Path) -> Path:
    """Write a byte-level tokenizer of 320 ids: 256 bytes, 6 special tokens, 58 merges.

    Every byte is its own token, so any token sequence decodes to some bytes, and text outside
    ASCII needs several tokens a character. `<|begin|>` is 256, `<|end|>` 257 (the end of a turn).
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    specials = {token: 256 + index for index, token in enumerate(_SPECIAL)}
    merges: list[tuple[str, str]] = []
    pairs = (
        "thinereronreonatenndtiesorteofedisitalarsttontngsehaasouiole"
        "vecomedehiriroicneearacelichllbemasiomurcaeltalansdifohopelo"
    )
    full = {**vocab, **specials}
    for left, right in zip(pairs[::2], pairs[1::2], strict=True):
        if left + right not in full and len(full) < 320:
            merges.append((left, right))
            full[left + right] = len(full)
    tokenizer = Tokenizer(models.BPE(vocab=full, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)
    if len(fast) != 320:
        raise RuntimeError(f"the tokenizer has {len(fast)} ids instead of 320")
    return folder


def make_soft_checkpoint(folder: Path, family: str, **settings: object) -> Path:
    """Weights as small as a trained model's, in bfloat16, which blurs their logits by about 0.005;
    the large ones that `make_checkpoint` gives would be blurred by ten times as much."""
    make_checkpoint(
        folder, family, hidden_size=256, intermediate_size=512, head_dim=64,
        num_attention_heads=8, num_key_value_heads=2, eos_token_id=319, initializer_range=0.04,
        **settings,
    )  # fmt: skip
    config = AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
