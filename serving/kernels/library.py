"""The native kernels, loaded into this process: a thin typed door to their C interface."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from pathlib import Path

import torch

from serving.kernels.compile import CompileError, build

__all__ = ["AttentionFields", "LayerFields", "MatrixFields", "StageFields", "native", "reset"]

log = logging.getLogger(__name__)

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class MatrixFields(ctypes.Structure):
    """A packed weight: `Matrix` of native/gemm.h."""

    _fields_ = [("data", _POINTER), ("n", _LONG), ("k", _LONG)]


class AttentionFields(ctypes.Structure):
    """`Attention` of native/attention_tasks.h."""

    _fields_ = [
        ("kv", _POINTER),
        ("page_tables", _POINTER),
        ("table_stride", _LONG),
        ("query_starts", _POINTER),
        ("context_lens", _POINTER),
        ("sequences", _LONG),
        ("page_size", _LONG),
        ("heads", _LONG),
        ("kv_heads", _LONG),
        ("head_dim", _LONG),
        ("scale", _FLOAT),
        ("window", _LONG),
    ]


class LayerFields(ctypes.Structure):
    """`LayerWeights` of native/stage.h."""

    _fields_ = [
        ("qkv", MatrixFields),
        ("o", MatrixFields),
        ("gate_up", MatrixFields),
        ("down", MatrixFields),
        ("input_norm", _POINTER),
        ("post_norm", _POINTER),
        ("q_norm", _POINTER),
        ("k_norm", _POINTER),
        ("qkv_bias", _POINTER),
        ("o_bias", _POINTER),
        ("window", _LONG),
    ]


class StageFields(ctypes.Structure):
    """`StageCall` of native/stage.h."""

    _fields_ = [
        ("layers", ctypes.POINTER(LayerFields)),
        ("kv", ctypes.POINTER(_POINTER)),
        ("num_layers", _LONG),
        ("hidden", _LONG),
        ("intermediate", _LONG),
        ("eps", _FLOAT),
        ("residual", _POINTER),
        ("tokens", _LONG),
        ("positions", _POINTER),
        ("slots", _POINTER),
        ("cos_sin", _POINTER),
        ("workspace", _POINTER),
        ("wanted", _POINTER),
        ("num_wanted", _LONG),
        ("result", _POINTER),
    ]


_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "lectern_openmp": ([_POINTER] * 3, None),
    "lectern_packed_elements": ([_LONG, _LONG], _LONG),
    "lectern_pack": ([_POINTER, _LONG, _LONG, _LONG, _POINTER, _INT], None),
    "lectern_rows": ([_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER], None),
    "lectern_linear": (
        [_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT, _POINTER, _INT],
        None,
    ),
    "lectern_rms_norm": (
        [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _FLOAT, _POINTER, _POINTER, _INT],
        None,
    ),
    "lectern_silu_mul": ([_POINTER, _LONG, _LONG, _POINTER, _INT], None),
    "lectern_rotary": (
        [_POINTER] * 3
        + [_LONG] * 3
        + [_POINTER] * 2
        + [_FLOAT]
        + [_POINTER] * 3
        + [_LONG] * 5
        + [_POINTER] * 2
        + [_INT],
        None,
    ),
    "lectern_attention": ([_POINTER, _LONG, _POINTER, _POINTER, _INT], None),
    "lectern_draw": ([_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _INT], None),
    "lectern_stage_workspace": ([_LONG] * 6, _LONG),
    "lectern_stage": ([_POINTER, _POINTER, _INT], None),
}

_loading = threading.Lock()


def native() -> ctypes.CDLL | None:
    """The native kernels, or None where this machine (or `LECTERN_NATIVE=0`) has none.

    The first call builds and loads them, which may take some seconds, and logs the outcome.
    """
    with _loading:
        return _load()


def reset() -> None:
    """Forget the outcome of loading, so that the next call looks again."""
    with _loading:
        _load.cache_clear()


@functools.cache
def _load() -> ctypes.CDLL | None:
    if os.environ.get("LECTERN_NATIVE") == "0":
        log.info("native kernels are off (LECTERN_NATIVE=0); plain torch is used")
        return None
    try:
        path = build()
        library = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result
        runtime = _openmp_runtime()
    except (CompileError, OSError, AttributeError) as error:
        log.warning("no native kernels: %s; plain torch is used, which is slower", error)
        return None
    library.lectern_openmp(
        *(
            ctypes.cast(getattr(runtime, name), _POINTER)
            for name in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        )
    )
    log.info("native kernels loaded from %s", path)
    return library


def _openmp_runtime() -> ctypes.CDLL:
    """The OpenMP runtime that torch runs on, so that there is one pool of threads."""
    torch.get_num_threads()
    loaded: list[Path] = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(("libgomp", "libomp", "libiomp")) and path not in loaded:
            loaded.append(path)
    loaded.sort(key=lambda path: "torch" not in path.parts)
    for path in loaded:
        runtime = ctypes.CDLL(str(path))
        if hasattr(runtime, "GOMP_parallel"):
            return runtime
    raise OSError("torch runs on no OpenMP runtime that can be shared")
