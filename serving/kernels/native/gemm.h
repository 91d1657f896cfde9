// Products of a few or many bf16 rows with a weight matrix held in panels.
//
// A weight [N, K] is stored as panels of 16 rows: panel p, pair j of columns holds the 16 values
// pairs (W[16p + i, 2j], W[16p + i, 2j + 1]), 64 bytes, one operand of vdpbf16ps. N is padded to a
// multiple of 32 and K to a multiple of 4 with zeros. The left operand is packed in blocks of at
// most 14 rows: pair j of a block holds each row's columns 2j and 2j + 1.
//
// Two panels against 14 rows fill 28 of the 32 vector registers. At few rows the product is as
// long as the weights take to arrive, so while one pair of panels is multiplied the next pair is
// prefetched into the second-level cache: neither the memory nor the multiplier waits.
#pragma once

#include "team.h"

namespace lectern {

constexpr int kMaxRows = 14;

struct Matrix {
  const bf16* data = nullptr;
  long n = 0, k = 0;
  long padded_k() const { return (k + 3) / 4 * 4; }
  long panels() const { return (n + 31) / 32 * 2; }
  const bf16* panel(long p) const { return data + p * 16 * padded_k(); }
};

// Rows packed in blocks for the left side of a product. Blocks are as even as they can be: the
// first `longer` of them hold one row more than the rest.
struct Rows {
  bf16* data;
  long m, k, padded, blocks, base, longer;

  Rows(bf16* data, long m, long k)
      : data(data),
        m(m),
        k(k),
        padded((k + 3) / 4 * 4),
        blocks((m + kMaxRows - 1) / kMaxRows),
        base(m / blocks),
        longer(m % blocks) {}

  long first(long b) const { return b * base + (b < longer ? b : longer); }
  long rows(long b) const { return base + (b < longer ? 1 : 0); }
  bf16* block(long b) const { return data + first(b) * padded; }
  long block_of(long row) const {
    const long split = longer * (base + 1);
    return row < split ? row / (base + 1) : longer + (row - split) / base;
  }
  // Where row `row` of the block of `count` rows that begins at `first` has its column (even); the
  // next pair of columns is `count` places further.
  uint32_t* place(long first, long count, long row, long column) const {
    return reinterpret_cast<uint32_t*>(data + first * padded) + column / 2 * count + row - first;
  }
  // Writes n values (n even) of a row from column `column` (even) on.
  void put(long row, long column, const bf16* values, long n) const {
    const long b = block_of(row), count = rows(b);
    uint32_t* out = place(first(b), count, row, column);
    for (long j = 0; j < n / 2; ++j) std::memcpy(out + j * count, values + 2 * j, 4);
  }
  // Writes a whole row, with the zeros that pad it.
  void put_row(long row, const bf16* values) const {
    const long even = k / 2 * 2;
    put(row, 0, values, even);
    bf16 rest[4] = {0, 0, 0, 0};
    if (k > even) rest[0] = values[even];
    if (padded > even) put(row, even, rest, padded - even);
  }
};

// out[r][0:32] = rows of a (packed, M rows) times two panels, over `pairs` pairs of columns (even).
// Ahead lines of each of the panels at next0 and next1 are prefetched every two pairs.
template <int M, int Ahead>
void tile(const bf16* a, const bf16* b0, const bf16* b1, long pairs, const char* next0,
          const char* next1, float* out) {
  __m512 low[M], high[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) low[i] = high[i] = _mm512_setzero_ps();
  for (long j = 0; j < pairs; j += 2) {
    if constexpr (Ahead >= 1) {
      _mm_prefetch(next0, _MM_HINT_T1);
      _mm_prefetch(next1, _MM_HINT_T1);
    }
    if constexpr (Ahead >= 2) {
      _mm_prefetch(next0 + 64, _MM_HINT_T1);
      _mm_prefetch(next1 + 64, _MM_HINT_T1);
    }
    next0 += 64 * Ahead;
    next1 += 64 * Ahead;
#pragma GCC unroll 2
    for (int u = 0; u < 2; ++u) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(b0 + (j + u) * 32);
      const __m512bh w1 = (__m512bh)_mm512_loadu_si512(b1 + (j + u) * 32);
      const bf16* pair = a + (j + u) * M * 2;
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        int bits;
        std::memcpy(&bits, pair + 2 * i, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(bits);
        low[i] = _mm512_dpbf16_ps(low[i], x, w0);
        high[i] = _mm512_dpbf16_ps(high[i], x, w1);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    _mm512_store_ps(out + i * 32, low[i]);
    _mm512_store_ps(out + i * 32 + 16, high[i]);
  }
}

using Tile = void (*)(const bf16*, const bf16*, const bf16*, long, const char*, const char*,
                      float*);

#define LECTERN_TILES(M) {tile<M, 0>, tile<M, 1>, tile<M, 2>}
inline const Tile kTiles[kMaxRows + 1][3] = {
    {},                LECTERN_TILES(1),  LECTERN_TILES(2),  LECTERN_TILES(3),
    LECTERN_TILES(4),  LECTERN_TILES(5),  LECTERN_TILES(6),  LECTERN_TILES(7),
    LECTERN_TILES(8),  LECTERN_TILES(9),  LECTERN_TILES(10), LECTERN_TILES(11),
    LECTERN_TILES(12), LECTERN_TILES(13), LECTERN_TILES(14)};
#undef LECTERN_TILES

// Rows of the left side that are multiplied with one pair of panels after the other take so many
// bytes at most: with two pairs of panels they stay in a second-level cache of 1 MiB.
constexpr long kSpanBytes = 400 << 10;

// Multiplies packed rows with a weight. `halves` pairs panel g with panel g + panels/2 (gate with
// up) instead of panels 2g and 2g + 1; it needs n to be a multiple of 32. For every tile
// `finish(first_row, rows, group, out)` is called with out[rows][32] in float32. `after`, when
// given, is the weight of the next product: its first panels are prefetched at the end.
template <class Finish>
void multiply(Team& team, const Rows& a, const Matrix& w, bool halves, const Matrix* after,
              Finish finish) {
  const long groups = w.panels() / 2, pairs = w.padded_k() / 2, blocks = a.blocks;
  const long first_step = halves ? 1 : 2, second = halves ? groups : 1;
  const long fitting = std::max<long>(1, kSpanBytes / (kMaxRows * a.padded * long(sizeof(bf16))));
  const long spans = (blocks + fitting - 1) / fitting, items = spans * groups;
  std::atomic<long>& counter = team.counter();
  alignas(64) float out[kMaxRows * 32];
  long item = team.id;
  while (item < items) {
    const long next = counter.fetch_add(1, std::memory_order_relaxed) + team.size;
    const long group = item % groups, span = item / groups;
    const bf16* b0 = w.panel(group * first_step);
    const bf16* b1 = w.panel(group * first_step + second);
    const char *next0 = nullptr, *next1 = nullptr;
    if (next < items) {
      next0 = reinterpret_cast<const char*>(w.panel(next % groups * first_step));
      next1 = reinterpret_cast<const char*>(w.panel(next % groups * first_step + second));
    } else if (after != nullptr && 2 * team.id + 1 < after->panels()) {
      next0 = reinterpret_cast<const char*>(after->panel(2 * team.id));
      next1 = reinterpret_cast<const char*>(after->panel(2 * team.id + 1));
    }
    const long begin = span * blocks / spans, end = (span + 1) * blocks / spans;
    for (long b = begin; b < end; ++b) {
      int ahead = 0;
      long skip = 0;
      if (next0 != nullptr && b < begin + 2) {
        ahead = end - begin == 1 ? 2 : 1;
        skip = (b - begin) * (pairs / 2) * 64;
      }
      const long rows = a.rows(b);
      kTiles[rows][ahead](a.block(b), b0, b1, pairs, next0 + skip, next1 + skip, out);
      finish(a.first(b), rows, group, out);
    }
    item = next;
  }
}

// Packs one panel pair's worth of weight rows: W [n, k] with row stride `stride` into panels.
inline void pack_panel(const bf16* w, long n, long k, long stride, long panel, bf16* out) {
  const long padded = (k + 3) / 4 * 4;
  bf16* to = out + panel * 16 * padded;
  for (long i = 0; i < 16; ++i) {
    const long row = panel * 16 + i;
    for (long j = 0; j < padded; ++j) {
      to[j / 2 * 32 + i * 2 + j % 2] = row < n && j < k ? w[row * stride + j] : bf16(0);
    }
  }
}

inline void unpack_row(const Matrix& w, long row, bf16* out) {
  const bf16* from = w.panel(row / 16) + row % 16 * 2;
  for (long j = 0; j < w.k; ++j) out[j] = from[j / 2 * 32 + j % 2];
}

}  // namespace lectern
