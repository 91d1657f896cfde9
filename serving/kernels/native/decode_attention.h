// Attention of a sequence with one query token, over a range of kv heads: its pages are read once,
// keys first, then values. Scores and sums are float32.
#pragma once

#include "attention_tasks.h"

namespace lectern {

// Lane sums of 16 vectors, half of the tree at a time: fold8 takes v[i] and v[i + 8] as soon as
// both are there, fold_all ends with lane i holding the sum of v[i].
inline __m512 fold8(__m512 v, __m512 other) {
  const __m512 lo = _mm512_shuffle_f32x4(v, other, 0x88);
  const __m512 hi = _mm512_shuffle_f32x4(v, other, 0xdd);
  return _mm512_add_ps(lo, hi);  // 128-bit lanes: v[i], v[i], v[i+8], v[i+8]
}

inline __m512 fold_all(const __m512* a) {
  __m512 b[4], c[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) b[i] = fold8(a[i], a[i + 4]);  // v[i], v[i+8], v[i+4], v[i+12]
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 lo = _mm512_unpacklo_ps(b[2 * i], b[2 * i + 1]);
    const __m512 hi = _mm512_unpackhi_ps(b[2 * i], b[2 * i + 1]);
    c[i] = _mm512_add_ps(lo, hi);  // in each lane: b[2i], b[2i+1], twice
  }
  const __m512 lo = _mm512_shuffle_ps(c[0], c[1], 0x44);
  const __m512 hi = _mm512_shuffle_ps(c[0], c[1], 0xee);
  const __m512 d = _mm512_add_ps(lo, hi);  // in lane l rows 0..3 of one of the blocks 0, 8, 4, 12
  return _mm512_shuffle_f32x4(d, d, 0xd8);
}

// Softmax of n scores in place, unnormalised; pads to `padded` with zeros. Returns the sum.
inline float softmax_row(float* scores, long n, long padded, float scale) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (long j = 0; j < n; j += 16) {
    const __mmask16 mask = tail_mask(n - j);
    top = _mm512_mask_max_ps(top, mask, top, _mm512_maskz_loadu_ps(mask, scores + j));
  }
  const __m512 high = _mm512_set1_ps(_mm512_reduce_max_ps(top) * scale);
  const __m512 by = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (long j = 0; j < padded; j += 16) {
    const __mmask16 mask = j < n ? tail_mask(n - j) : __mmask16(0);
    const __m512 e = _mm512_maskz_mov_ps(
        mask, exp16(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(mask, scores + j), by, high)));
    sum = _mm512_add_ps(sum, e);
    _mm512_storeu_ps(scores + j, e);
  }
  return _mm512_reduce_add_ps(sum);
}

// Scores of up to 16 keys against Heads query heads that share them: q [Heads][head_dim], keys at
// `stride`. The heads go together because a key's lines seldom stay in the first-level cache: the
// rows of a page lie a power of two apart. What lies `ahead` elements behind each key is prefetched
// as the key is read.
template <int Vectors, int Heads>
void score16(const bf16* q, const bf16* keys, long stride, long count, long ahead, __m512* out) {
  __m512 folded[Heads][8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const bf16* key = keys + std::min<long>(i, count - 1) * stride;
    const bf16* other = keys + std::min<long>(i + 8, count - 1) * stride;
    __m512 sum[Heads], other_sum[Heads];
#pragma GCC unroll 2
    for (int h = 0; h < Heads; ++h) sum[h] = other_sum[h] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) {
      const __m512bh x = (__m512bh)_mm512_loadu_si512(key + 32 * j);
      const __m512bh y = (__m512bh)_mm512_loadu_si512(other + 32 * j);
      _mm_prefetch(reinterpret_cast<const char*>(key + 32 * j + ahead), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(other + 32 * j + ahead), _MM_HINT_T1);
#pragma GCC unroll 2
      for (int h = 0; h < Heads; ++h) {
        const __m512bh query = (__m512bh)_mm512_loadu_si512(q + (h * Vectors + j) * 32);
        sum[h] = _mm512_dpbf16_ps(sum[h], x, query);
        other_sum[h] = _mm512_dpbf16_ps(other_sum[h], y, query);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < Heads; ++h) folded[h][i] = fold8(sum[h], other_sum[h]);
  }
#pragma GCC unroll 2
  for (int h = 0; h < Heads; ++h) out[h] = fold_all(folded[h]);
}

// sums[Heads][head_dim] += weights of up to `count` keys times their values. weights are bf16
// pairs, a row for each head; sums hold each 32 values in the order that unpacking leaves: see
// store_sums. `ahead` is as for score16.
template <int Vectors, int Heads>
void add_values(const bf16* weights, long weight_stride, const bf16* values, long stride,
                long count, long ahead, float* sums) {
  constexpr int kStep = Vectors <= 4 ? Vectors : Vectors / 2;
  for (int part = 0; part < Vectors; part += kStep) {
    __m512 low[Heads][kStep], high[Heads][kStep];
#pragma GCC unroll 2
    for (int h = 0; h < Heads; ++h) {
#pragma GCC unroll 4
      for (int j = 0; j < kStep; ++j) {
        const float* from = sums + (h * Vectors + part + j) * 32;
        low[h][j] = _mm512_loadu_ps(from);
        high[h][j] = _mm512_loadu_ps(from + 16);
      }
    }
    for (long i = 0; i < count; i += 2) {
      const bf16* a = values + i * stride + 32 * part;
      const bf16* b = i + 1 < count ? a + stride : a;  // an odd last key pairs with weight zero
      __m512bh weight[Heads];
#pragma GCC unroll 2
      for (int h = 0; h < Heads; ++h) {
        int pair;
        std::memcpy(&pair, weights + h * weight_stride + i, 4);
        weight[h] = (__m512bh)_mm512_set1_epi32(pair);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kStep; ++j) {
        const __m512i x = _mm512_loadu_si512(a + 32 * j), y = _mm512_loadu_si512(b + 32 * j);
        _mm_prefetch(reinterpret_cast<const char*>(a + 32 * j + ahead), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(b + 32 * j + ahead), _MM_HINT_T1);
        const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(x, y);
        const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 2
        for (int h = 0; h < Heads; ++h) {
          low[h][j] = _mm512_dpbf16_ps(low[h][j], weight[h], first);
          high[h][j] = _mm512_dpbf16_ps(high[h][j], weight[h], second);
        }
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < Heads; ++h) {
#pragma GCC unroll 4
      for (int j = 0; j < kStep; ++j) {
        float* to = sums + (h * Vectors + part + j) * 32;
        _mm512_storeu_ps(to, low[h][j]);
        _mm512_storeu_ps(to + 16, high[h][j]);
      }
    }
  }
}

// Rounds 32 sums to bf16, undoing the order of unpacklo and unpackhi (4 values each a lane).
inline void store_sums(const float* sums, float factor, bf16* out) {
  const __m512 by = _mm512_set1_ps(factor);
  const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(sums), by);
  const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(sums + 16), by);
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second =
      _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  const __m512 a = _mm512_permutex2var_ps(low, first, high);
  const __m512 b = _mm512_permutex2var_ps(low, second, high);
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

// put(row, head, values[head_dim]) receives each finished head of each query row.
template <int Vectors, class Put>
void decode_task(const Attention& a, const AttentionTask& task, const bf16* q, long q_stride,
                 AttentionScratch& scratch, Put put) {
  const long s = task.sequence, length = a.context_lens[s], group = a.group();
  const long begin = a.window > 0 ? std::max<long>(0, length - a.window) : 0;
  const long heads = (task.head_last - task.head_first) * group;
  const long row = a.query_starts[s], stride = a.kv_heads * a.head_dim;
  // Runs of keys are cut at pages and at 16 keys; each run takes 16 places in the score rows, so
  // that no mask is needed afterwards: places without a key hold minus infinity.
  const long runs_a_page = (a.page_size + 15) / 16;
  const long places = ((length - 1) / a.page_size - begin / a.page_size + 1) * runs_a_page * 16;
  scratch.scores.resize(heads * places);
  scratch.weights.resize(heads * places);
  scratch.sums.resize(heads * a.head_dim);
  const bf16* query = q + row * q_stride + task.head_first * group * a.head_dim;
  // Calls body(page, its first key, place, ahead): the next page lies `ahead` elements further; the
  // last one's next is `then`.
  auto each_page = [&](const bf16* then, auto&& body) {
    long place = 0;
    for (long page = begin / a.page_size; page * a.page_size < length; ++page) {
      const long after = (page + 1) * a.page_size;
      const bf16* base = a.keys(s, page * a.page_size, 0);
      body(page, base, place, (after < length ? a.keys(s, after, 0) : then) - base);
      place += runs_a_page * 16;
    }
  };
  const bf16* start = a.keys(s, begin / a.page_size * a.page_size, 0);
  auto scores = [&](long page, const bf16* base, long place, long ahead) {
    for (long run = 0; run < runs_a_page; ++run) {
      const long at = page * a.page_size + run * 16;
      const long count = std::min({16L, length - at, a.page_size - run * 16});
      for (long h = task.head_first; h < task.head_last; ++h) {
        __mmask16 seen = count > 0 ? tail_mask(count) : __mmask16(0);
        if (at < begin) seen &= static_cast<__mmask16>(0xffffu << std::min(16L, begin - at));
        for (long g = 0; g < group; g += 2) {
          const long head = (h - task.head_first) * group + g;
          float* out = scratch.scores.data() + head * places + place + run * 16;
          const bf16* keys = base + run * 16 * stride + h * a.head_dim;
          __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
          if (seen != 0 && g + 1 < group) {
            score16<Vectors, 2>(query + head * a.head_dim, keys, stride, count, ahead, sums);
          } else if (seen != 0) {
            score16<Vectors, 1>(query + head * a.head_dim, keys, stride, count, ahead, sums);
          }
          const __m512 none = _mm512_set1_ps(-INFINITY);
          _mm512_storeu_ps(out, _mm512_mask_mov_ps(none, seen, sums[0]));
          if (g + 1 < group)
            _mm512_storeu_ps(out + places, _mm512_mask_mov_ps(none, seen, sums[1]));
        }
      }
    }
  };
  each_page(start + a.values_offset(), scores);
  std::fill(scratch.sums.begin(), scratch.sums.end(), 0.0f);
  std::vector<float>& totals = scratch.accumulators;
  totals.resize(heads);
  for (long head = 0; head < heads; ++head) {
    float* scores = scratch.scores.data() + head * places;
    totals[head] = softmax_row(scores, places, places, a.scale);
    for (long j = 0; j < places; j += 16)
      _mm256_storeu_si256(
          reinterpret_cast<__m256i*>(scratch.weights.data() + head * places + j),
          narrow(_mm512_loadu_ps(scores + j)));
  }
  auto weighted = [&](long page, const bf16* base, long place, long ahead) {
    for (long run = 0; run < runs_a_page; ++run) {
      const long at = page * a.page_size + run * 16;
      const long count = std::min({16L, length - at, a.page_size - run * 16});
      if (count <= 0) break;
      for (long h = task.head_first; h < task.head_last; ++h) {
        const bf16* values = base + a.values_offset() + run * 16 * stride + h * a.head_dim;
        for (long g = 0; g < group; g += 2) {
          const long head = (h - task.head_first) * group + g;
          const bf16* weights = scratch.weights.data() + head * places + place + run * 16;
          float* sums = scratch.sums.data() + head * a.head_dim;
          if (g + 1 < group) {
            add_values<Vectors, 2>(weights, places, values, stride, count, ahead, sums);
          } else {
            add_values<Vectors, 1>(weights, places, values, stride, count, ahead, sums);
          }
        }
      }
    }
  };
  each_page(start, weighted);
  alignas(64) bf16 result[256];
  for (long head = 0; head < heads; ++head) {
    for (int j = 0; j < Vectors; ++j)
      store_sums(scratch.sums.data() + head * a.head_dim + 32 * j, 1.0f / totals[head],
                 result + 32 * j);
    put(row, task.head_first * group + head, result);
  }
}

}  // namespace lectern
