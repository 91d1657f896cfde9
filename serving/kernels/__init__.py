"""The arithmetic of a decoder layer, fast where this machine allows and correct everywhere.

All functions take torch tensors and return new ones unless they say otherwise. On a CPU with
AVX-512 and bf16 products, bf16 tensors go to native code (`native/`, compiled on first use, off
with `LECTERN_NATIVE=0`); everything else is plain torch (`reference.py`).

- `pack_linear(weight [N, K], bias [N] | None) -> PackedLinear`: `linear(x [M, K]) -> [M, N]`;
  `linear.float32(x)` leaves the product in float32; `linear.rows(ids [T]) -> [T, K]` reads rows of
  the weight back (tied embedding, one copy).
- `rms_norm(x [..., H], weight [H], eps) -> [..., H]`
- `add_rms_norm(x [T, H], residual [T, H], weight [H], eps) -> (normed, x + residual)`
- `silu_and_mul(x [T, 2I]) -> [T, I]`
- `rotary_and_write_kv(q, k, v, cos_sin, positions, kv, slot_mapping, page_size, *, q_norm=None,
  k_norm=None, eps=1e-6) -> rotated q`: q [T, Hq, D], k and v [T, Hkv, D] (views of one fused
  product are fine), cos_sin [P, D] float32 (cosines, then sines, D/2 each), kv [pages, 2,
  page_size, Hkv, D] written in place at slot_mapping [T]; q_norm and k_norm [D] are Qwen3's
  per-head norms, done in the same pass.
- `paged_attention(q [T, Hq, D], kv, *, query_starts, context_lens, page_tables, page_size, scale,
  sliding_window=None) -> [T, Hq, D]`: query_starts [S + 1] and context_lens [S] are the host lists.
- `native_draw(logits [R, V], temperature [R], uniform [R]) -> tokens [R] | None`: inverse CDF
  in one pass over the logits.
- `native_stage(layers, ...) -> NativeStage | None`: a run of whole layers as one native call.
"""

from serving.kernels.attention import paged_attention
from serving.kernels.draw import native_draw
from serving.kernels.library import native
from serving.kernels.linear import PackedLinear, pack_linear
from serving.kernels.stage import DecoderWeights, NativeStage, native_stage
from serving.kernels.tokenwise import (
    add_rms_norm,
    rms_norm,
    rotary_and_write_kv,
    silu_and_mul,
)

__all__ = [
    "DecoderWeights",
    "NativeStage",
    "PackedLinear",
    "add_rms_norm",
    "native",
    "native_draw",
    "native_stage",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rotary_and_write_kv",
    "silu_and_mul",
]
