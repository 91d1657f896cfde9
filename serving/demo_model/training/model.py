"""The model in plain PyTorch: a Qwen3 decoder whose rows hold several packed documents."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from serving.demo_model.training.prompts import END_OF_TEXT, TURN_END

#: What a token may see, for the attention used: see `attend`.
Mask = BlockMask | Tensor | None

#: Tokens of a block of FlexAttention's mask.
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model, in elements; `context` in tokens."""

    vocabulary: int = 12_032
    hidden: int = 256
    layers: int = 11
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 704
    context: int = 4096
    rope_theta: float = 100_000.0
    epsilon: float = 1e-6

    def config(self, tokens: dict[str, int]) -> dict[str, Any]:
        """Return what `config.json` says; `tokens` gives the ids of the special tokens."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": [tokens[TURN_END], tokens[END_OF_TEXT]],
            "pad_token_id": tokens[END_OF_TEXT],
            "torch_dtype": "bfloat16",
        }

    def values(self) -> dict[str, Any]:
        return asdict(self)


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (wide * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_dim, shape.epsilon)
        self.k_norm = RMSNorm(shape.head_dim, shape.epsilon)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        rows, tokens, _ = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(rows, tokens, -1, self.shape.head_dim)

        query = rotated(self.q_norm(split(self.q_proj(x))), rope).transpose(1, 2)
        key = rotated(self.k_norm(split(self.k_proj(x))), rope).transpose(1, 2)
        value = split(self.v_proj(x)).transpose(1, 2)
        mixed = attend(query, key, value, mask)
        made: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, tokens, -1))
        return made


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return made


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self._dropout = dropout
        self.input_layernorm = RMSNorm(shape.hidden, shape.epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.epsilon)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        x = x + self._part(self.self_attn(self.input_layernorm(x), rope, mask))
        made: Tensor = x + self._part(self.mlp(self.post_attention_layernorm(x)))
        return made

    def _part(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self._dropout, self.training) if self._dropout else x


class Decoder(nn.Module):
    """Parameter names are those of a Qwen3 checkpoint, behind the prefix `model.`. While it trains,
    the share `dropout` of what layers add to the residual is left out.
    """

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.epsilon)
        self._start()

    def _start(self) -> None:
        # The embedding is also the output: small, so that first predictions are even; what a
        # layer adds to the residual is scaled by their number.
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim == 2:
                std = 0.5 / math.sqrt(parameter.shape[1])
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.shape.layers)
                nn.init.normal_(parameter, std=std)

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        """Return [rows, tokens, hidden] behind the last norm."""
        rope = rope_tables(positions, self.shape)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, rope, mask)
        made: Tensor = self.norm(x)
        return made

    def forward(self, tokens: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        """Return logits [rows, tokens, vocabulary]."""
        return functional.linear(self.hidden(tokens, positions, mask), self.embed_tokens.weight)

    def loss(
        self, tokens: Tensor, positions: Tensor, mask: Mask, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of cross-entropies and the plain one over answers (from 1 on)."""
        logits = self.forward(tokens, positions, mask).float().flatten(0, 1)
        each = functional.cross_entropy(logits, targets.flatten(), reduction="none")
        flat = weights.flatten()
        answers = (flat >= 1.0).float()
        return (each * flat).sum(), (each.detach() * answers).sum()


def rope_tables(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, [rows, tokens, 1, head_dim / 2]."""
    steps = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * shape.rope_theta ** (-steps / shape.head_dim)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (i, i + half) of each head, as Qwen3 does."""
    cos, sin = rope
    left, right = x.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """Attend to what `mask` lets see: a block mask, a boolean tensor, or None for all before."""
    if isinstance(mask, BlockMask):
        found = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        assert isinstance(found, Tensor)
        return found
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


def dense_mask(documents: Tensor) -> Tensor:
    """Return [rows, 1, tokens, tokens]: what a token may see, itself and before, its document."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def no_mask(documents: Tensor) -> None:
    """Let a token see the documents before its own as well: for devices without FlexAttention."""


class BlockMasks:
    """FlexAttention's mask of the same meaning as `dense_mask`, for documents that count up.

    The function that says what is seen and the tensor it reads stay the same from step to step,
    so that compiled code stays valid; a mask therefore holds until the next one is made. Which
    blocks are seen follows from the documents at their ends: no mask of all tokens is made.
    """

    def __init__(self) -> None:
        self._documents: Tensor | None = None

    def __call__(self, documents: Tensor) -> BlockMask:
        tokens = documents.shape[1]
        if self._documents is None or self._documents.shape != documents.shape:
            held = self._documents = documents.to(torch.int32)

            def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (held[row, query] == held[row, key]) & (query >= key)

            self._seen = seen
        else:
            self._documents.copy_(documents)
        starts = torch.arange(0, tokens, _BLOCK, device=documents.device)
        first = self._documents[:, starts]
        last = self._documents[:, (starts + _BLOCK - 1).clamp(max=tokens - 1)]
        later = starts[:, None] > starts
        some = (last[:, None] >= first[:, :, None]) & (later | (starts[:, None] == starts))
        whole = later & (first[:, None] == last[:, :, None])
        return BlockMask.from_kv_blocks(
            *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=self._seen,
            seq_lengths=(tokens, tokens),
        )  # fmt: skip


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block has, and their numbers first: [rows, 1, ...]."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
