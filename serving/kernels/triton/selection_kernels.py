# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The lowest logit that top-k, top-p and min-p keep: the kernels. `selection.py` launches them.

`serving.sampling.filters` says what each filter keeps. Here a row's bound is found in these steps:

1. every block of the row: its mass, and the largest logit of each part of it;
2. one program a row: a bound below the answer. The k-th largest of the parts' maxima is at most the
   k-th largest logit; where the maxima alone hold the mass p, the answer is not below them; tokens
   that share less than 1 - p of the mass among all of them are never needed;
3. what is not below that bound is written to a short list, in any order;
4. where the list is too short, one program a row goes over the whole row until what may still be
   the answer fits, and the list is written anew;
5. one program a row: bisection over the list.

Counts are integers and masses are integers in fixed point, so their sums depend on no order, and a
row's result on nothing but the row and its settings.
"""

import triton
import triton.language as tl

# Mass 1 is this; a vocabulary of 2^20 tokens cannot overflow 63 bits.
_ONE = tl.constexpr(2.0**42)
_LOWEST_KEY = tl.constexpr(-(2**31))
_HIGHEST_KEY = tl.constexpr(2**31 - 1)
# So often an interval is halved by value, which finds most cuts soonest; then by bits, which needs
# 32 turns at most.
_BY_VALUE = tl.constexpr(20)


@triton.jit
def ordered(x):
    """The bits of float32 values as int32 in the order of the values; both zeros are the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 value of an ordered key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(x, best, scale):
    """Mass relative to the best logit's, in fixed point."""
    return (tl.exp((x - best) * scale) * _ONE).to(tl.int64)


@triton.jit
def _tally(source, count, pivot, best, scale, SIZE: tl.constexpr, MASS: tl.constexpr):
    """Of source[:count]: number (and mass) not below the pivot, the least of them, and the
    largest below it."""
    number = tl.zeros([SIZE], tl.int32)
    mass = tl.zeros([SIZE], tl.int64)
    least = tl.full([SIZE], _HIGHEST_KEY, tl.int32)
    most = tl.full([SIZE], _LOWEST_KEY, tl.int32)
    for start in range(0, count, SIZE):
        at = start + tl.arange(0, SIZE)
        inside = at < count
        x = tl.load(source + at, mask=inside, other=float("-inf")).to(tl.float32)
        key = ordered(x)
        above = (key >= pivot) & inside
        number += above.to(tl.int32)
        if MASS:
            mass += tl.where(above, _weights(x, best, scale), 0)
        least = tl.minimum(least, tl.where(above, key, _HIGHEST_KEY))
        most = tl.maximum(most, tl.where(above | (at >= count), _LOWEST_KEY, key))
    return tl.sum(number, 0), tl.sum(mass, 0), tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _middle(low, high, turn):
    """A key above `low` and not above `high` (int64), between them."""
    middle = (low + high + 1) >> 1
    if turn < _BY_VALUE:
        value = value_of(low.to(tl.int32)) * 0.5 + value_of(high.to(tl.int32)) * 0.5
        middle = tl.minimum(tl.maximum(ordered(value).to(tl.int64), low + 1), high)
    return middle


@triton.jit
def _search(
    source, count, goal, low, high, best, scale, number_above, mass_above,
    SIZE: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The largest key of source[:count] such that the values not below it, and what is above all
    of them, reach the goal in number (or in mass); `low` if all from there on do not. The answer
    lies between low and high."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    turn = 0
    while low < high:
        middle = _middle(low, high, turn)
        number, mass, least, most = _tally(
            source, count, middle.to(tl.int32), best, scale, SIZE, MASS
        )
        enough = number + number_above >= goal
        if MASS:
            enough = (mass + mass_above).to(tl.float64) >= goal
        if enough:
            low = least.to(tl.int64)
        else:
            high = most.to(tl.int64)
        turn += 1
    return low.to(tl.int32)


@triton.jit
def _narrow(
    source, count, goal, low, high, number_low, room, best, scale,
    SIZE: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """As `_search` over a whole row, until no more than `room` values are left to choose from.

    number_low: how many are not below low. Returns the interval, and number and mass above it.
    """
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    number_above = number_low * 0
    mass_above = number_above.to(tl.int64)
    turn = 0
    while (low < high) & (number_low - number_above > room):
        middle = _middle(low, high, turn)
        number, mass, least, most = _tally(
            source, count, middle.to(tl.int32), best, scale, SIZE, MASS
        )
        enough = number >= goal
        if MASS:
            enough = mass.to(tl.float64) >= goal
        if enough:
            low = least.to(tl.int64)
            number_low = number
        else:
            high = most.to(tl.int64)
            number_above = number
            mass_above = mass
        turn += 1
    return low.to(tl.int32), high.to(tl.int32), number_above, mass_above


@triton.jit
def _settings(slots, row, top_k, top_p, reach, FILTERS: tl.constexpr):
    """top-k, top-p, min-p's reach below the best logit, and whether any of them is on."""
    slot = tl.load(slots + row)
    k = tl.load(top_k + slot)
    p = 1.0
    below = float("-inf")
    active = k > 0
    if FILTERS:
        p = tl.load(top_p + slot)
        below = tl.load(reach + slot)
        active = active | (p < 1.0) | (below > float("-inf"))
    return k, p, below, active


@triton.jit
def _scale(temperature, row, FILTERS: tl.constexpr):
    scale = 1.0
    if FILTERS:
        warmth = tl.load(temperature + row)
        scale = tl.where(warmth > 0, 1.0 / tl.where(warmth > 0, warmth, 1.0), 1.0)
    return scale


@triton.jit
def parts_kernel(
    logits, temperature, slots, top_k, top_p, reach, maxima, sums, row_stride, vocab, blocks,
    SIZE: tl.constexpr, PART_SIZE: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """One block of a row: the largest logit of each part, and the mass relative to the largest."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    _, _, _, active = _settings(slots, row, top_k, top_p, reach, FILTERS)
    if active == 0:
        return
    at = block * SIZE + tl.arange(0, SIZE)
    x = tl.load(
        logits + row.to(tl.int64) * row_stride + at, mask=at < vocab, other=float("-inf")
    ).to(tl.float32)
    best = tl.max(x, 0)
    finite = tl.where(best == float("-inf"), 0.0, best)
    scale = _scale(temperature, row, FILTERS)
    tl.store(sums + row * blocks + block, tl.sum(tl.exp((x - finite) * scale), 0))
    parts: tl.constexpr = SIZE // PART_SIZE
    part_best = tl.max(tl.reshape(x, [parts, PART_SIZE]), 1)
    tl.store(maxima + (row * blocks + block) * parts + tl.arange(0, parts), part_best)


@triton.jit
def bound_kernel(
    temperature, slots, top_k, top_p, reach, maxima, sums, lows, highs, floors, bests, totals,
    counts, numbers, masses, vocab, blocks,
    BLOCKS_PAD: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """One row: its best logit, its mass, and `lows`, which is not above what top-k or top-p keep.

    highs gets the best logit, the highest possible answer; floors the bound of min-p; lows is
    infinite where that is already the answer. Nothing is above the highest answer: numbers and
    masses are zero.
    """
    row = tl.program_id(0)
    k, p, below, active = _settings(slots, row, top_k, top_p, reach, FILTERS)
    tl.store(counts + row, 0)
    tl.store(numbers + row, 0)
    tl.store(masses + row, 0)
    tl.store(lows + row, float("inf"))
    tl.store(floors + row, float("-inf"))
    if active == 0:
        return
    b = tl.arange(0, BLOCKS_PAD)
    c = tl.arange(0, PARTS)
    own = maxima + row * blocks * PARTS
    within = b < blocks
    block_best = tl.max(
        tl.load(own + b[:, None] * PARTS + c[None, :], mask=within[:, None], other=float("-inf")),
        1,
    )
    best = tl.max(block_best, 0)
    if best == float("-inf"):
        return
    scale = _scale(temperature, row, FILTERS)
    mass = tl.load(sums + row * blocks + b, mask=within, other=0.0)
    total = tl.sum((mass * tl.exp((block_best - best) * scale)).to(tl.float64), 0)
    tl.store(bests + row, best)
    tl.store(highs + row, best)
    tl.store(totals + row, total)
    number = blocks * PARTS
    low = tl.full([], float("-inf"), tl.float32)
    if k > 0:
        if k <= number:
            low = value_of(
                _search(own, number, k, ordered(low), ordered(best), best, scale, 0, 0, SIZE, False)
            )
        if p >= 1.0:
            # The mass within top-k counts tokens that min-p leaves out; without top-p it does not.
            low = tl.maximum(low, best + below)
    elif p < 1.0:
        # Half of the share, so that rounding cannot matter.
        share = 0.5 * (1.0 - p) * total.to(tl.float32) / vocab
        low = best + tl.log(share) / scale
        goal = p.to(tl.float64) * total * _ONE
        low = value_of(
            _search(own, number, goal, ordered(low), ordered(best), best, scale, 0, 0, SIZE, True)
        )
        low = tl.maximum(low, best + below)
    tl.store(floors + row, best + below)
    if (k > 0) | (p < 1.0):
        tl.store(lows + row, low)


@triton.jit
def gather_kernel(
    logits, maxima, lows, highs, counts, values, ids, row_stride, vocab, blocks,
    SIZE: tl.constexpr, PARTS: tl.constexpr, ROOM: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Append a block's logits that may be the row's answer to the row's list.

    counts goes on beyond the list's room, so that it tells whether all of them are there.
    """
    row = tl.program_id(0)
    block = tl.program_id(1)
    low = tl.load(lows + row)
    if low == float("inf"):
        return
    best = tl.max(tl.load(maxima + (row * blocks + block) * PARTS + tl.arange(0, PARTS)), 0)
    if best < low:
        return
    at = block * SIZE + tl.arange(0, SIZE)
    x = tl.load(
        logits + row.to(tl.int64) * row_stride + at, mask=at < vocab, other=float("-inf")
    ).to(tl.float32)
    held = (x >= low) & (x > float("-inf")) & (x <= tl.load(highs + row))
    taken = held.to(tl.int32)
    place = tl.atomic_add(counts + row, tl.sum(taken, 0)) + tl.cumsum(taken, 0) - taken
    held = held & (place < ROOM)
    tl.store(values + row * ROOM + place, x, mask=held)
    if IDS:
        tl.store(ids + row * ROOM + place, at, mask=held)


@triton.jit
def _goals(
    source, count, cut, k, p, best, total, scale, SIZE: tl.constexpr,
):  # fmt: skip
    """The mass that top-p wants: of all tokens, or of the k largest once `cut`, the key of the
    k-th, is known. Of the tokens that tie with it only as many count as k has room for."""
    goal = p.to(tl.float64) * total * _ONE
    if k > 0:
        number, mass, _, _ = _tally(source, count, cut + 1, best, scale, SIZE, True)
        mass += (k - number).to(tl.int64) * _weights(value_of(cut), best, scale)
        goal = p.to(tl.float64) * mass.to(tl.float64)
    return goal


@triton.jit
def narrow_kernel(
    logits, temperature, slots, top_k, top_p, reach, lows, highs, floors, bests, totals, counts,
    numbers, masses, goals, again, row_stride, vocab,
    SIZE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One row whose list is too short: bounds between which no more lie than it has room for.

    The row is written to `again`, to be listed anew, unless the bounds meet. goals gets the mass
    that is still to be found for top-p, 0 if top-k is still to be found.
    """
    row = tl.program_id(0)
    count = tl.load(counts + row)
    low_value = tl.load(lows + row)
    tl.store(again + row, float("inf"))
    tl.store(goals + row, 0.0)
    if (count <= ROOM) | (low_value == float("inf")):
        return
    k, p, _, _ = _settings(slots, row, top_k, top_p, reach, True)
    scale = _scale(temperature, row, True)
    best = tl.load(bests + row)
    total = tl.load(totals + row)
    own = logits + row.to(tl.int64) * row_stride
    low = ordered(low_value)
    high = ordered(best)
    number = count * 0
    mass = number.to(tl.int64)
    goal = total * 0.0
    if k > 0:
        # Top-p needs to know the k-th largest itself.
        room = tl.where(p < 1.0, 0, ROOM)
        low, high, number, mass = _narrow(
            own, vocab, k, low, high, count, room, best, scale, SIZE, False
        )
        if p < 1.0:
            goal = _goals(own, vocab, low, k, p, best, total, scale, SIZE)
            high = ordered(best)
    else:
        goal = _goals(own, vocab, low, k, p, best, total, scale, SIZE)
    if p < 1.0:
        low, high, number, mass = _narrow(
            own, vocab, goal, low, high, count, ROOM, best, scale, SIZE, True
        )
    tl.store(lows + row, value_of(low))
    tl.store(highs + row, value_of(high))
    tl.store(numbers + row, number)
    tl.store(masses + row, mass)
    tl.store(goals + row, goal)
    tl.store(counts + row, 0)
    if low < high:
        tl.store(again + row, value_of(low))


@triton.jit
def cut_kernel(
    values, temperature, slots, top_k, top_p, reach, lows, highs, floors, bests, totals, counts,
    numbers, masses, goals,
    SIZE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One row's floor from its list: the highest of the bounds of its filters."""
    row = tl.program_id(0)
    low = tl.load(lows + row)
    if low == float("inf"):
        return
    k, p, _, _ = _settings(slots, row, top_k, top_p, reach, True)
    scale = _scale(temperature, row, True)
    own = values + row * ROOM
    count = tl.load(counts + row)
    best = tl.load(bests + row)
    high = ordered(tl.load(highs + row))
    number = tl.load(numbers + row)
    mass = tl.load(masses + row)
    goal = tl.load(goals + row)
    cut = ordered(low)
    if goal == 0.0:
        if k > 0:
            cut = _search(own, count, k, cut, high, best, scale, number, mass, SIZE, False)
        goal = _goals(own, count, cut, k, p, best, tl.load(totals + row), scale, SIZE)
    if p < 1.0:
        cut = _search(own, count, goal, cut, high, best, scale, number, mass, SIZE, True)
    tl.store(floors + row, tl.maximum(tl.load(floors + row), value_of(cut)))
