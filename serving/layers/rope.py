"""Rotary position embedding: frequencies of each kind of scaling, and the table of angles.

Frequencies are computed in float32 by the same steps as transformers takes, so that a greedy
float32 run agrees with it to the token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from serving.config.rope import RopeConfig

__all__ = ["inverse_frequencies", "rotary_table"]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians a position for each of the head_dim / 2 pairs, and the factor on cos and sin.

    default: 1 / theta^(2i / d) (Su et al., 2021). linear: that, divided by the factor. llama3: the
    rule published with Llama 3.1. yarn: Peng et al., 2023, equations 17 to 22.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    wavelengths = rope.theta**exponents  # of 2 pi positions each
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, wavelengths)
    frequencies = 1.0 / wavelengths
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    return frequencies, 1.0


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Short waves stay, long ones are stretched by the factor, those between are blended."""
    longest = rope.original_context / rope.low_freq_factor
    shortest = rope.original_context / rope.high_freq_factor
    waves = 2 * math.pi / frequencies
    stretched = torch.where(waves > longest, frequencies / rope.factor, frequencies)
    share = (rope.original_context / waves - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - share) * stretched / rope.factor + share * stretched
    between = (waves >= shortest) & (waves <= longest)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeConfig, head_dim: int, wavelengths: Tensor) -> tuple[Tensor, float]:
    """Fast pairs keep their frequency, slow ones are stretched, with a ramp between."""

    def pair_of(turns: float) -> float:
        """The pair that makes this many turns over the original context."""
        ratio = rope.original_context / (turns * 2 * math.pi)
        return (head_dim * math.log(ratio)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2).float() - low) / (high - low), 0, 1)
    kept = 1 - ramp
    stretched = 1.0 / (rope.factor * wavelengths)
    frequencies = stretched * (1 - kept) + (1.0 / wavelengths) * kept
    return frequencies, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def rotary_table(rope: RopeConfig, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """[positions, head_dim] float32: cosines of each pair's angle, then sines."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    angles = torch.arange(positions).float().unsqueeze(1) * frequencies
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1).to(device)
