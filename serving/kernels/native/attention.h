// Attention over paged keys and values in bf16, scores and sums in float32.
//
// kv is [pages, 2, page_size, kv_heads, head_dim]. A sequence with one query token is a decode task
// over a range of kv heads: its pages are read once, in the order they lie in memory. More query
// tokens are a prefill task: blocks of keys and values are packed as the weights of a product are
// and multiplied with blocks of 14 query rows, with an online softmax over the blocks.
// head_dim must be a multiple of 32 and at most 256.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"

namespace lectern {

struct Attention {
  const bf16* kv;
  const int32_t* page_tables;  // [sequences, table_stride]
  long table_stride;
  const int32_t* query_starts;  // [sequences + 1]
  const int32_t* context_lens;  // [sequences]
  long sequences, page_size, heads, kv_heads, head_dim;
  float scale;
  long window;  // 0: every earlier key is seen

  long group() const { return heads / kv_heads; }
  long page_elements() const { return 2 * page_size * kv_heads * head_dim; }
  const bf16* keys(long sequence, long position, long kv_head) const {
    const long page = page_tables[sequence * table_stride + position / page_size];
    return kv + page * page_elements() + (position % page_size * kv_heads + kv_head) * head_dim;
  }
  long values_offset() const { return page_size * kv_heads * head_dim; }
};

struct AttentionTask {
  long sequence, head_first, head_last;  // kv heads
  long token_first, token_last;          // query tokens within the sequence
  bool decode;
};

constexpr long kKeyBlock = 256;
constexpr long kQueryRows = 256;

// Cuts the work of one layer; long tasks come first so that threads end together.
inline std::vector<AttentionTask> attention_tasks(const Attention& a, int threads) {
  std::vector<AttentionTask> tasks;
  const long tokens = std::max<long>(1, kQueryRows / a.group());
  long decodes = 0;
  for (long s = 0; s < a.sequences; ++s) {
    const long count = a.query_starts[s + 1] - a.query_starts[s];
    decodes += count == 1;
    if (count < 2) continue;
    for (long t = (count - 1) / tokens * tokens; t >= 0; t -= tokens)
      for (long h = 0; h < a.kv_heads; ++h)
        tasks.push_back({s, h, h + 1, t, std::min(count, t + tokens), false});
  }
  if (decodes == 0) return tasks;
  const long parts = std::clamp<long>((4 * threads + decodes - 1) / decodes, 1, a.kv_heads);
  for (long s = 0; s < a.sequences; ++s) {
    if (a.query_starts[s + 1] - a.query_starts[s] != 1) continue;
    for (long p = 0; p < parts; ++p) {
      const long first = a.kv_heads * p / parts, last = a.kv_heads * (p + 1) / parts;
      if (first < last) tasks.push_back({s, first, last, 0, 1, true});
    }
  }
  return tasks;
}

// What a thread needs between the steps of a task; grown once, used again.
struct AttentionScratch {
  std::vector<float> scores, sums, accumulators;
  std::vector<bf16> queries, keys, values, weights;
};

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
// rows of a page lie a power of two apart.
template <int Vectors, int Heads>
void score16(const bf16* q, const bf16* keys, long stride, long count, __m512* out) {
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
// store_sums.
template <int Vectors, int Heads>
void add_values(const bf16* weights, long weight_stride, const bf16* values, long stride,
                long count, float* sums) {
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
  auto each_run = [&](auto&& body) {
    long place = 0;
    for (long page = begin / a.page_size; page * a.page_size < length; ++page) {
      // The next page lies elsewhere: the bodies ask for it early.
      const long after = (page + 1) * a.page_size;
      body(page, a.keys(s, page * a.page_size, 0), place,
           after < length ? a.keys(s, after, 0) : nullptr);
      place += runs_a_page * 16;
    }
  };
  auto prefetch = [&](const bf16* at) {  // one head of a run of the next page
    for (long i = 0; i < 16; ++i)
      for (long j = 0; j < a.head_dim; j += 32)
        _mm_prefetch(reinterpret_cast<const char*>(at + i * stride + j), _MM_HINT_T1);
  };
  each_run([&](long page, const bf16* base, long place, const bf16* ahead) {
    for (long run = 0; run < runs_a_page; ++run) {
      const long at = page * a.page_size + run * 16;
      const long count = std::min({16L, length - at, a.page_size - run * 16});
      for (long h = task.head_first; h < task.head_last; ++h) {
        if (ahead != nullptr) prefetch(ahead + run * 16 * stride + h * a.head_dim);
        __mmask16 seen = count > 0 ? tail_mask(count) : __mmask16(0);
        if (at < begin) seen &= static_cast<__mmask16>(0xffffu << std::min(16L, begin - at));
        for (long g = 0; g < group; g += 2) {
          const long head = (h - task.head_first) * group + g;
          float* out = scratch.scores.data() + head * places + place + run * 16;
          const bf16* keys = base + run * 16 * stride + h * a.head_dim;
          __m512 scores[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
          if (seen != 0 && g + 1 < group) {
            score16<Vectors, 2>(query + head * a.head_dim, keys, stride, count, scores);
          } else if (seen != 0) {
            score16<Vectors, 1>(query + head * a.head_dim, keys, stride, count, scores);
          }
          const __m512 none = _mm512_set1_ps(-INFINITY);
          _mm512_storeu_ps(out, _mm512_mask_mov_ps(none, seen, scores[0]));
          if (g + 1 < group)
            _mm512_storeu_ps(out + places, _mm512_mask_mov_ps(none, seen, scores[1]));
        }
      }
    }
  });
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
  each_run([&](long page, const bf16* base, long place, const bf16* ahead) {
    for (long run = 0; run < runs_a_page; ++run) {
      const long at = page * a.page_size + run * 16;
      const long count = std::min({16L, length - at, a.page_size - run * 16});
      if (count <= 0) break;
      for (long h = task.head_first; h < task.head_last; ++h) {
        if (ahead != nullptr)
          prefetch(ahead + a.values_offset() + run * 16 * stride + h * a.head_dim);
        const bf16* values =
            base + a.values_offset() + run * 16 * stride + h * a.head_dim;
        for (long g = 0; g < group; g += 2) {
          const long head = (h - task.head_first) * group + g;
          const bf16* weights = scratch.weights.data() + head * places + place + run * 16;
          float* sums = scratch.sums.data() + head * a.head_dim;
          if (g + 1 < group) {
            add_values<Vectors, 2>(weights, places, values, stride, count, sums);
          } else {
            add_values<Vectors, 1>(weights, places, values, stride, count, sums);
          }
        }
      }
    }
  });
  alignas(64) bf16 result[256];
  for (long head = 0; head < heads; ++head) {
    for (int j = 0; j < Vectors; ++j)
      store_sums(scratch.sums.data() + head * a.head_dim + 32 * j, 1.0f / totals[head],
                 result + 32 * j);
    put(row, task.head_first * group + head, result);
  }
}

template <class Put>
void prefill_task(const Attention& a, const AttentionTask& task, const bf16* q, long q_stride,
                  AttentionScratch& scratch, Put put) {
  const long s = task.sequence, group = a.group(), dim = a.head_dim, head = task.head_first;
  const long queries = a.query_starts[s + 1] - a.query_starts[s];
  const long offset = a.context_lens[s] - queries;  // position of the sequence's first query
  const Rows shape{nullptr, (task.token_last - task.token_first) * group, dim};
  scratch.queries.resize(shape.m * dim);
  scratch.keys.resize(kKeyBlock * dim);
  scratch.values.resize(kKeyBlock * dim);
  scratch.weights.resize(kMaxRows * kKeyBlock);
  scratch.scores.resize(kMaxRows * kKeyBlock);
  scratch.sums.assign(shape.m * 2, 0.0f);  // running maximum and running sum of each row
  scratch.accumulators.assign(shape.m * dim, 0.0f);
  const Rows packed{scratch.queries.data(), shape.m, dim};
  auto position = [&](long row) { return offset + task.token_first + row / group; };
  auto begin_of = [&](long row) {
    return a.window > 0 ? std::max<long>(0, position(row) - a.window + 1) : 0L;
  };
  for (long r = 0; r < shape.m; ++r) {
    const long token = a.query_starts[s] + task.token_first + r / group;
    packed.put(r, 0, q + token * q_stride + (head * group + r % group) * dim, dim);
    scratch.sums[2 * r] = -INFINITY;
  }
  alignas(64) float out[kMaxRows * 32];
  const long end = position(shape.m - 1) + 1;
  for (long block = begin_of(0) / a.page_size * a.page_size; block < end; block += kKeyBlock) {
    const long keys = std::min(kKeyBlock, end - block), padded = (keys + 31) / 32 * 32;
    for (long i = 0; i < padded; ++i) {
      uint32_t* to = reinterpret_cast<uint32_t*>(scratch.keys.data()) + i / 16 * 8 * dim + i % 16;
      if (i >= keys) {
        for (long j = 0; j < dim / 2; ++j) to[j * 16] = 0;
        continue;
      }
      const bf16* key = a.keys(s, block + i, head);
      for (long j = 0; j < dim / 2; ++j) std::memcpy(to + j * 16, key + 2 * j, 4);
    }
    for (long i = 0; i < padded; i += 2) {
      const bf16* even = i < keys ? a.keys(s, block + i, head) + a.values_offset() : nullptr;
      const bf16* odd = i + 1 < keys ? a.keys(s, block + i + 1, head) + a.values_offset() : nullptr;
      for (long j = 0; j < dim / 16; ++j) {
        const __m256i none = _mm256_setzero_si256();
        const __m256i x = even ? _mm256_loadu_si256((const __m256i*)(even + 16 * j)) : none;
        const __m256i y = odd ? _mm256_loadu_si256((const __m256i*)(odd + 16 * j)) : none;
        _mm512_storeu_si512(
            scratch.values.data() + j * 16 * padded + i * 16,
            _mm512_or_si512(_mm512_cvtepu16_epi32(x),
                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16)));
      }
    }
    for (long b = 0; b < packed.blocks(); ++b) {
      const long first = packed.first(b), rows = packed.rows(b);
      const long last_key = std::min(keys, position(first + rows - 1) + 1 - block);
      if (last_key <= 0 || begin_of(first) >= block + keys) continue;
      const long columns = (last_key + 31) / 32 * 32;
      for (long j = 0; j < columns; j += 32) {
        const bf16* panel = scratch.keys.data() + j * dim;
        kTiles[rows][0](packed.block(b), panel, panel + 16 * dim, dim / 2, nullptr, nullptr, out);
        for (long r = 0; r < rows; ++r)
          std::memcpy(scratch.scores.data() + r * kKeyBlock + j, out + 32 * r, 128);
      }
      float factors[kMaxRows];
      for (long r = 0; r < rows; ++r) {
        float* scores = scratch.scores.data() + r * kKeyBlock;
        const long row = first + r, seen = std::clamp<long>(position(row) + 1 - block, 0, columns);
        const long from = std::clamp<long>(begin_of(row) - block, 0, columns);
        float &top = scratch.sums[2 * row], &total = scratch.sums[2 * row + 1];
        auto visible = [&](long j) {
          __mmask16 mask = j < seen ? tail_mask(seen - j) : __mmask16(0);
          if (j < from) mask &= static_cast<__mmask16>(0xffffu << std::min(16L, from - j));
          return mask;
        };
        __m512 most = _mm512_set1_ps(-INFINITY);
        for (long j = from / 16 * 16; j < seen; j += 16)
          most = _mm512_mask_max_ps(most, visible(j), most, _mm512_loadu_ps(scores + j));
        const float highest = std::max(top, _mm512_reduce_max_ps(most) * a.scale);
        factors[r] = top == -INFINITY ? 0.0f : std::exp(top - highest);
        const __m512 by = _mm512_set1_ps(a.scale), high = _mm512_set1_ps(highest);
        __m512 sum = _mm512_setzero_ps();
        uint32_t* to = reinterpret_cast<uint32_t*>(scratch.weights.data()) + r;
        for (long j = 0; j < columns; j += 16) {
          const __m512 e = _mm512_maskz_mov_ps(
              visible(j), exp16(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), by, high)));
          sum = _mm512_add_ps(sum, e);
          alignas(32) uint32_t pairs[8];
          _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), narrow(e));
          for (int i = 0; i < 8; ++i) to[(j / 2 + i) * rows] = pairs[i];
        }
        if (seen > from) top = highest;
        total = total * factors[r] + _mm512_reduce_add_ps(sum);
      }
      for (long j = 0; j < dim; j += 32) {
        const bf16* panel = scratch.values.data() + j * padded;
        kTiles[rows][0](scratch.weights.data(), panel, panel + 16 * padded, columns / 2, nullptr,
                        nullptr, out);
        for (long r = 0; r < rows; ++r) {
          float* sum = scratch.accumulators.data() + (first + r) * dim + j;
          const __m512 by = _mm512_set1_ps(factors[r]);
          _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_loadu_ps(sum), by,
                                                _mm512_load_ps(out + 32 * r)));
          _mm512_storeu_ps(sum + 16, _mm512_fmadd_ps(_mm512_loadu_ps(sum + 16), by,
                                                     _mm512_load_ps(out + 32 * r + 16)));
        }
      }
    }
  }
  alignas(64) bf16 result[256];
  for (long r = 0; r < shape.m; ++r) {
    const __m512 by = _mm512_set1_ps(1.0f / scratch.sums[2 * r + 1]);
    for (long j = 0; j < dim; j += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + j),
                          narrow(_mm512_mul_ps(
                              _mm512_loadu_ps(scratch.accumulators.data() + r * dim + j), by)));
    put(a.query_starts[s] + task.token_first + r / group, head * group + r % group, result);
  }
}

template <class Put>
void attend(Team& team, const Attention& a, const std::vector<AttentionTask>& tasks, const bf16* q,
            long q_stride, Put put) {
  thread_local AttentionScratch scratch;
  std::atomic<long>& counter = team.counter();
  for (;;) {
    const long at = counter.fetch_add(1, std::memory_order_relaxed);
    if (at >= static_cast<long>(tasks.size())) return;
    const AttentionTask& task = tasks[at];
    if (!task.decode) {
      prefill_task(a, task, q, q_stride, scratch, put);
      continue;
    }
    switch (a.head_dim / 32) {
      case 1: decode_task<1>(a, task, q, q_stride, scratch, put); break;
      case 2: decode_task<2>(a, task, q, q_stride, scratch, put); break;
      case 3: decode_task<3>(a, task, q, q_stride, scratch, put); break;
      case 4: decode_task<4>(a, task, q, q_stride, scratch, put); break;
      case 6: decode_task<6>(a, task, q, q_stride, scratch, put); break;
      case 8: decode_task<8>(a, task, q, q_stride, scratch, put); break;
      default: break;
    }
  }
}

}  // namespace lectern
