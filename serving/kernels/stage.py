"""A run of decoder layers as one native call: no Python between the layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.kernels.attention import HEAD_DIMS
from serving.kernels.library import AttentionFields, LayerFields, StageFields, native
from serving.kernels.linear import NativeLinear, PackedLinear
from serving.kernels.memory import large_zeros

__all__ = ["DecoderWeights", "NativeStage", "native_stage"]


@dataclass(frozen=True)
class DecoderWeights:
    """One pre-norm layer with grouped-query attention and a gated feed-forward part."""

    input_norm: Tensor
    qkv: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: PackedLinear
    post_norm: Tensor
    gate_up: PackedLinear
    down: PackedLinear
    sliding_window: int | None


class NativeStage:
    """bf16 layers on the CPU, run by one team of threads from the first norm to the last sum.

    The arithmetic is that of the single kernels, but for fewer roundings: a product is added to
    the residual before it is rounded.
    """

    def __init__(
        self,
        layers: Sequence[DecoderWeights],
        library: ctypes.CDLL,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
    ) -> None:
        self._library, self._kept = library, list(layers)
        self._heads, self._kv_heads, self._dim = num_heads, num_kv_heads, head_dim
        self._eps, self._scale = eps, scale
        self._hidden = layers[0].qkv.in_features
        self._intermediate = layers[0].down.in_features
        self._fields = [_fields(layer) for layer in layers]
        self._workspace = torch.empty(0, dtype=torch.bfloat16)

    def __call__(
        self,
        hidden: Tensor,
        kv: Sequence[Tensor],
        cos_sin: Tensor,
        *,
        positions: Tensor,
        slot_mapping: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        page_tables: Tensor,
        page_size: int,
        wanted: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        """hidden: [T, H] -> [T, H], a new tensor; kv: one tensor a layer, written in place, of the
        layers that run, which are consecutive and begin with number `first`.

        wanted: [R] int64, the rows to return; behind its attention the last layer then computes
        only these, and the result is [R, H]. positions, slot_mapping: [T] int64; query_starts
        [S + 1], context_lens [S] and page_tables [S, max_pages]: int32; cos_sin: [P, D] float32.
        """
        fields = self._fields[first : first + len(kv)]
        if not kv or len(fields) != len(kv):
            raise ValueError(f"{len(kv)} KV tensors from layer {first} on fit no layers")
        for pages in kv:
            if pages.dtype is not torch.bfloat16 or not pages.is_contiguous():
                raise ValueError("the native stage needs contiguous bfloat16 KV tensors")
        tokens = hidden.shape[0]
        residual = hidden.clone(memory_format=torch.contiguous_format)
        if tokens == 0:
            return residual
        result = residual if wanted is None else residual.new_empty(len(wanted), self._hidden)
        needed = self._library.lectern_stage_workspace(
            tokens, self._hidden, self._intermediate, self._heads, self._kv_heads, self._dim
        )
        if self._workspace.numel() < needed:
            self._workspace = large_zeros([needed], torch.bfloat16)
        held = [
            positions.to(torch.int64).contiguous(),
            slot_mapping.to(torch.int64).contiguous(),
            query_starts.to(torch.int32).contiguous(),
            context_lens.to(torch.int32).contiguous(),
            page_tables.to(torch.int32).contiguous(),
        ]
        if wanted is not None:
            # One element more than there may be: the address of nothing would mean all rows.
            held.append(torch.cat((wanted.to(torch.int64), positions.new_zeros(1))))
        attention = AttentionFields(
            kv=None,
            page_tables=held[4].data_ptr(),
            table_stride=page_tables.shape[1],
            query_starts=held[2].data_ptr(),
            context_lens=held[3].data_ptr(),
            sequences=context_lens.shape[0],
            page_size=page_size,
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=self._dim,
            scale=self._scale,
            window=0,
        )
        call = StageFields(
            layers=(LayerFields * len(fields))(*fields),
            kv=(ctypes.c_void_p * len(kv))(*(pages.data_ptr() for pages in kv)),
            num_layers=len(kv),
            hidden=self._hidden,
            intermediate=self._intermediate,
            eps=self._eps,
            residual=residual.data_ptr(),
            tokens=tokens,
            positions=held[0].data_ptr(),
            slots=held[1].data_ptr(),
            cos_sin=cos_sin.data_ptr(),
            workspace=self._workspace.data_ptr(),
            wanted=None if wanted is None else held[5].data_ptr(),
            num_wanted=0 if wanted is None else len(wanted),
            result=result.data_ptr(),
        )
        self._library.lectern_stage(
            ctypes.byref(call), ctypes.byref(attention), torch.get_num_threads()
        )
        return result


def native_stage(
    layers: Sequence[DecoderWeights],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    scale: float,
) -> NativeStage | None:
    """The layers as one call, or None where these layers or this machine do not allow it."""
    library = native()
    if library is None or not layers or head_dim not in HEAD_DIMS:
        return None
    for layer in layers:
        products = (layer.qkv, layer.output, layer.gate_up, layer.down)
        if not all(isinstance(product, NativeLinear) for product in products):
            return None
        # The gate is applied where its product is still in registers, sixteen columns at a time.
        if layer.down.in_features % 16:
            return None
        if layer.gate_up.bias is not None or layer.down.bias is not None:
            return None
    return NativeStage(
        layers,
        library,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        eps=eps,
        scale=scale,
    )


def _fields(layer: DecoderWeights) -> LayerFields:
    def matrix(product: PackedLinear) -> object:
        assert isinstance(product, NativeLinear)
        return product.fields()

    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return LayerFields(
        qkv=matrix(layer.qkv),
        o=matrix(layer.output),
        gate_up=matrix(layer.gate_up),
        down=matrix(layer.down),
        input_norm=pointer(layer.input_norm),
        post_norm=pointer(layer.post_norm),
        q_norm=pointer(layer.q_norm),
        k_norm=pointer(layer.k_norm),
        qkv_bias=pointer(layer.qkv.bias),
        o_bias=pointer(layer.output.bias),
        window=layer.sliding_window or 0,
    )
