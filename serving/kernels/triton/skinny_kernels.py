"""Products of a few rows with a large weight: the weight is read once, at the memory's speed."""

# Kernels carry no types; the launchers in `skinny` do.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def skinny_kernel(
    x, w, bias, out, parts, arrived, rows, columns, width, steps,
    x_stride, out_stride,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over k < width of x[m, k] w[n, k]; a program has BLOCK_N columns and `steps`
    blocks of k, one of SPLIT shares.

    The weight's rows are the long side of the matrix instruction, the few rows of x its short one.
    Programs of one block of columns add their parts in the order of k, whoever comes last, so
    the sum is the same in every run.
    """
    block = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, TILE)
    start = split * steps * BLOCK_K
    w_rows = w + n.to(tl.int64)[:, None] * width
    x_rows = x + m[None, :] * x_stride
    total = tl.zeros((BLOCK_N, TILE), dtype=tl.float32)
    for step in range(steps):
        k = start + step * BLOCK_K + tl.arange(0, BLOCK_K)
        if EVEN:
            w_tile = tl.load(
                w_rows + k[None, :], mask=n[:, None] < columns, other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            x_tile = tl.load(x_rows + k[:, None], mask=m[None, :] < rows, other=0.0)
        else:
            w_tile = tl.load(
                w_rows + k[None, :], mask=(n[:, None] < columns) & (k[None, :] < width), other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            x_tile = tl.load(
                x_rows + k[:, None], mask=(m[None, :] < rows) & (k[:, None] < width), other=0.0
            )
        total = tl.dot(w_tile, x_tile, total)
    seen = (n[:, None] < columns) & (m[None, :] < rows)
    if SPLIT > 1:
        size: tl.constexpr = BLOCK_N * TILE
        inside = tl.arange(0, BLOCK_N)[:, None] * TILE + m[None, :]
        base = parts + block.to(tl.int64) * SPLIT * size
        tl.store(base + split * size + inside, total)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + block, 1, sem="acq_rel")
        if before == SPLIT - 1:
            total = tl.load(base + inside, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                total += tl.load(base + other * size + inside, cache_modifier=".cg")
            tl.store(arrived + block, 0)  # ready for the next launch
            if HAS_BIAS:
                total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
            tl.store(out + m[None, :] * out_stride + n[:, None], total, mask=seen)
    else:
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
        tl.store(out + m[None, :] * out_stride + n[:, None], total, mask=seen)
