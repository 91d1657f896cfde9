"""Kernels of our own for NVIDIA GPUs, in Triton.

Import this package only where triton is installed (`serving.kernels.device.gpu_kernels` looks).
Kernels run on the stream that is current when they are launched: a stage makes its own stream
current once a step, so none runs on the default one. Nothing here waits for the device.
"""

from serving.kernels.triton.attention import (
    DecodeShape,
    PrefillShape,
    decode_shape,
    decode_shares,
    paged_decode,
    paged_prefill,
    prefill_shape,
    prefill_tiles,
    share_room,
)
from serving.kernels.triton.logprobs import token_logprobs
from serving.kernels.triton.penalties import ban_tokens, count_tokens, penalize
from serving.kernels.triton.push import push_rows
from serving.kernels.triton.sampling import draw_tokens, enter_pages, resolve_tokens
from serving.kernels.triton.selection import Floors, filter_floors
from serving.kernels.triton.skinny import MOST_ROWS, skinny_linear
from serving.kernels.triton.tokens import keep_tokens
from serving.kernels.triton.tokenwise import (
    add_rms_norm,
    rms_norm,
    rotary_and_write_kv,
    silu_and_mul,
)

__all__ = [
    "MOST_ROWS",
    "DecodeShape",
    "Floors",
    "PrefillShape",
    "add_rms_norm",
    "ban_tokens",
    "count_tokens",
    "decode_shape",
    "decode_shares",
    "draw_tokens",
    "enter_pages",
    "filter_floors",
    "keep_tokens",
    "paged_decode",
    "paged_prefill",
    "penalize",
    "prefill_shape",
    "prefill_tiles",
    "push_rows",
    "resolve_tokens",
    "rms_norm",
    "rotary_and_write_kv",
    "share_room",
    "silu_and_mul",
    "skinny_linear",
    "token_logprobs",
]
