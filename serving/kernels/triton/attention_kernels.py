# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Attention over paged keys and values: the kernels. `attention.py` launches them.

Both kernels keep a running maximum and sum (online softmax, Milakov and Gimelshein, 2018) in base
2. Query heads that share a key-value head stand as rows of one product, so keys are read once.
Loads outside a sequence are masked: what such slots hold, be it NaN, reaches no result.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def decode_kernel(
    q, kv, tables, table_rows, lens, shares, out, parts, weights, scale, window,
    q_token, q_head, kv_page, kv_value, kv_slot, kv_head, table_stride, out_token, out_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of one sequence's keys for one key-value head and its newest token's queries.

    shares holds (sequence, first key, one past the last, part): a negative sequence is no share,
    part -1 the whole of a sequence. Other parts are written normalised, with the base-2 logarithm
    of their weight, for `merge_kernel`.
    """
    share = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.load(shares + 4 * share)
    if sequence < 0:
        return
    first = tl.load(shares + 4 * share + 1)
    last = tl.load(shares + 4 * share + 2)
    part = tl.load(shares + 4 * share + 3)
    if WINDOW:
        first = tl.maximum(first, tl.load(lens + sequence) - window)
    row = sequence
    if ROWS:
        row = tl.load(table_rows + sequence)
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, DIM_PAD)
    held = (g[:, None] < GROUP) & (d[None, :] < DIM)
    heads = head * GROUP + g
    queries = tl.load(
        q + sequence.to(tl.int64) * q_token + heads[:, None] * q_head + d[None, :],
        mask=held, other=0.0,
    )  # fmt: skip
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    summed = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    pages = tables + row.to(tl.int64) * table_stride
    head_start = kv + head * kv_head
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < last
        page = tl.load(pages + at // PAGE, mask=inside, other=0).to(tl.int64)
        keys_at = head_start + page * kv_page + (at % PAGE) * kv_slot
        mask = inside[:, None] & (d[None, :] < DIM)
        keys = tl.load(keys_at[:, None] + d[None, :], mask=mask, other=0.0)
        values = tl.load(keys_at[:, None] + kv_value + d[None, :], mask=mask, other=0.0)
        x = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        x = tl.where(inside[None, :], x, float("-inf"))
        better = tl.maximum(best, tl.max(x, 1))
        shrink = tl.exp2(best - better)
        p = tl.exp2(x - better[:, None])
        total = total * shrink + tl.sum(p, 1)
        summed = summed * shrink[:, None] + tl.dot(
            p.to(values.dtype), values, input_precision=PRECISION
        )
        best = better
    safe = tl.where(total > 0, total, 1.0)
    result = summed / safe[:, None]
    if part < 0:
        tl.store(
            out + sequence.to(tl.int64) * out_token + heads[:, None] * out_head + d[None, :],
            result.to(out.dtype.element_ty), mask=held,
        )  # fmt: skip
    else:
        at = part * HEADS + heads
        tl.store(parts + at[:, None].to(tl.int64) * DIM + d[None, :], result, mask=held)
        weight = tl.where(total > 0, best + tl.log2(safe), float("-inf"))
        tl.store(weights + at, weight, mask=g < GROUP)


@triton.jit
def merge_kernel(
    parts, weights, part_starts, out, out_token, out_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    PARTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one sequence, PARTS at a time, for TOGETHER query heads.

    A sequence of one part is done already.
    """
    sequence = tl.program_id(0)
    first = tl.load(part_starts + sequence)
    last = tl.load(part_starts + sequence + 1)
    if last - first < 2:
        return
    heads = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    d = tl.arange(0, DIM_PAD)
    inside = (heads[:, None] < HEADS) & (d[None, :] < DIM)
    best = tl.full([TOGETHER], float("-inf"), tl.float32)
    total = tl.zeros([TOGETHER], tl.float32)
    summed = tl.zeros([TOGETHER, DIM_PAD], tl.float32)
    for start in range(first, last, PARTS):
        i = start + tl.arange(0, PARTS)
        at = i[:, None] * HEADS + heads[None, :]
        held = (i[:, None] < last) & (heads[None, :] < HEADS)
        weight = tl.load(weights + at, mask=held, other=float("-inf"))
        values = tl.load(
            parts + at[:, :, None].to(tl.int64) * DIM + d[None, None, :],
            mask=held[:, :, None] & (d[None, None, :] < DIM), other=0.0,
        )  # fmt: skip
        better = tl.maximum(best, tl.max(weight, 0))
        finite = tl.where(better == float("-inf"), 0.0, better)
        shrink = tl.exp2(best - finite)
        weight = tl.exp2(weight - finite[None, :])
        total = total * shrink + tl.sum(weight, 0)
        summed = summed * shrink[:, None] + tl.sum(values * weight[:, :, None], 0)
        best = better
    # Places beyond the last head have no weight.
    total = tl.where(total > 0, total, 1.0)
    tl.store(
        out + sequence.to(tl.int64) * out_token + heads[:, None] * out_head + d[None, :],
        (summed / total[:, None]).to(out.dtype.element_ty), mask=inside,
    )  # fmt: skip


@triton.jit
def prefill_kernel(
    q, kv, tables, table_rows, starts, lens, tiles, out, scale, window,
    q_token, q_head, kv_page, kv_value, kv_slot, kv_head, table_stride, out_token, out_head,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile: TILE // GROUP_PAD tokens of one sequence times the heads of one key-value head.

    tiles holds (sequence, its first new token) pairs; a negative sequence is an empty tile.
    """
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    if sequence < 0:
        return
    offset = tl.load(tiles + 2 * tile + 1)
    row = sequence
    if ROWS:
        row = tl.load(table_rows + sequence)
    first_row = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - first_row
    length = tl.load(lens + sequence)
    r = tl.arange(0, TILE)
    d = tl.arange(0, DIM_PAD)
    token = offset + r // GROUP_PAD
    query_head = head * GROUP + r % GROUP_PAD
    real = (token < count) & (r % GROUP_PAD < GROUP)
    held = real[:, None] & (d[None, :] < DIM)
    token_at = (first_row + token).to(tl.int64)
    queries = tl.load(
        q + token_at[:, None] * q_token + query_head[:, None] * q_head + d[None, :],
        mask=held, other=0.0,
    )  # fmt: skip
    place = length - count + token
    oldest = length - count + offset
    end = tl.minimum(length, oldest + TILE // GROUP_PAD)
    begin = 0
    if WINDOW:
        begin = tl.maximum(oldest - window + 1, 0) // BLOCK * BLOCK
    # Every row of the tile sees every key before `seen_by_all`, where no window hides any.
    seen_by_all = (oldest + 1) // BLOCK * BLOCK
    if WINDOW:
        seen_by_all = begin
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    summed = tl.zeros([TILE, DIM_PAD], tl.float32)
    pages = tables + row.to(tl.int64) * table_stride
    head_start = kv + head * kv_head
    for start in range(begin, seen_by_all, BLOCK):
        at = start + tl.arange(0, BLOCK)
        page = tl.load(pages + at // PAGE).to(tl.int64)
        keys_at = head_start + page * kv_page + (at % PAGE) * kv_slot
        keys = tl.load(keys_at[:, None] + d[None, :], mask=d[None, :] < DIM, other=0.0)
        x = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        better = tl.maximum(best, tl.max(x, 1))
        shrink = tl.exp2(best - better)
        p = tl.exp2(x - better[:, None])
        values = tl.load(keys_at[:, None] + kv_value + d[None, :], mask=d[None, :] < DIM, other=0.0)
        total = total * shrink + tl.sum(p, 1)
        summed = summed * shrink[:, None]
        summed = tl.dot(p.to(values.dtype), values, summed, input_precision=PRECISION)
        best = better
    for start in range(seen_by_all, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        page = tl.load(pages + at // PAGE, mask=inside, other=0).to(tl.int64)
        keys_at = head_start + page * kv_page + (at % PAGE) * kv_slot
        mask = inside[:, None] & (d[None, :] < DIM)
        keys = tl.load(keys_at[:, None] + d[None, :], mask=mask, other=0.0)
        x = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        seen = (at[None, :] <= place[:, None]) & inside[None, :]
        if WINDOW:
            seen = seen & (at[None, :] > place[:, None] - window)
        x = tl.where(seen, x, float("-inf"))
        better = tl.maximum(best, tl.max(x, 1))
        # A row that has seen no key yet must not compute -inf - -inf.
        finite = tl.where(better == float("-inf"), 0.0, better)
        shrink = tl.exp2(best - finite)
        p = tl.exp2(x - finite[:, None])
        values = tl.load(keys_at[:, None] + kv_value + d[None, :], mask=mask, other=0.0)
        total = total * shrink + tl.sum(p, 1)
        summed = summed * shrink[:, None]
        summed = tl.dot(p.to(values.dtype), values, summed, input_precision=PRECISION)
        best = better
    result = summed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out + token_at[:, None] * out_token + query_head[:, None] * out_head + d[None, :],
        result.to(out.dtype.element_ty), mask=held,
    )  # fmt: skip
