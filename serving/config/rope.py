"""What a checkpoint says about its rotary position embedding, in either spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serving.config.fields import Fields
from serving.errors import ModelError

__all__ = ["ROPE_KINDS", "RopeConfig", "read_rope"]

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """A rotary embedding: its base and how its frequencies are stretched for long contexts.

    `original_context` is the length the model was first trained for (llama3 and yarn).
    `attention_factor` None means the value that yarn's paper derives from `factor`.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rope(config: Mapping[str, Any], max_positions: int, where: str) -> RopeConfig:
    """Read `rope_parameters`, or `rope_theta` with `rope_scaling`, from a config.json.

    Raises ModelError for a kind that is not supported or a value that makes no sense.
    """
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict):
        raise ModelError(f"{where}: the RoPE settings must be an object, not {found!r}.")
    rope = Fields(found, f"{where} (RoPE settings)")
    outer = Fields(config, where)
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"{where}: RoPE scaling {kind!r} is not supported; Lectern knows "
            f"{', '.join(ROPE_KINDS)}."
        )
    partial = rope.number("partial_rotary_factor", outer.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ModelError(
            f"{where}: partial_rotary_factor {partial} is not supported; "
            "only heads that are rotated whole are."
        )
    theta = rope.number("rope_theta", outer.number("rope_theta", 10_000.0))
    if theta <= 1.0:
        raise ModelError(f"{where}: rope_theta must be above 1, not {theta}.")
    if kind == "default":
        return RopeConfig(theta=theta)

    original = rope.whole("original_max_position_embeddings", max_positions)
    if kind in ("llama3", "yarn"):
        # A value beside the RoPE settings wins over one inside them, as in transformers.
        original = outer.whole("original_max_position_embeddings", original)
    if kind == "yarn" and found.get("factor", 0) is None:
        factor = max_positions / original
    else:
        factor = rope.number("factor", None)
    if factor <= 0 or original <= 0:
        raise ModelError(
            f"{where}: the RoPE factor and original context must be above 0, "
            f"not {factor} and {original}."
        )
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor", None), rope.number("high_freq_factor", None)
        if not 0 < low < high:
            raise ModelError(
                f"{where}: RoPE scaling llama3 needs 0 < low_freq_factor < high_freq_factor, "
                f"not {low} and {high}."
            )
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=factor,
            original_context=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=original,
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.optional_number("beta_fast") or 32.0,
        beta_slow=rope.optional_number("beta_slow") or 1.0,
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
