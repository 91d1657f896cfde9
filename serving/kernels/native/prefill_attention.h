// Attention of several query tokens of a sequence for one kv head: blocks of keys and values are
// packed as the weights of a product are and multiplied with blocks of 14 query rows, with an online
// softmax over the blocks. Scores and sums are float32.
#pragma once

#include "attention_tasks.h"

namespace lectern {

template <class Put>
void prefill_task(const Attention& a, const AttentionTask& task, const bf16* q, long q_stride,
                  AttentionScratch& scratch, Put put) {
  const long s = task.sequence, group = a.group(), dim = a.head_dim, head = task.head_first;
  const long queries = a.query_starts[s + 1] - a.query_starts[s];
  const long offset = a.context_lens[s] - queries;  // position of the sequence's first query
  const long query_rows = (task.token_last - task.token_first) * group;
  scratch.queries.resize(query_rows * dim);
  scratch.keys.resize(kKeyBlock * dim);
  scratch.values.resize(kKeyBlock * dim);
  scratch.weights.resize(kMaxRows * kKeyBlock);
  scratch.scores.resize(kMaxRows * kKeyBlock);
  scratch.sums.assign(query_rows * 2, 0.0f);  // running maximum and running sum of each row
  scratch.accumulators.assign(query_rows * dim, 0.0f);
  const Rows packed(scratch.queries.data(), query_rows, dim);
  auto position = [&](long row) { return offset + task.token_first + row / group; };
  auto begin_of = [&](long row) {
    return a.window > 0 ? std::max<long>(0, position(row) - a.window + 1) : 0L;
  };
  for (long r = 0; r < query_rows; ++r) {
    const long token = a.query_starts[s] + task.token_first + r / group;
    packed.put(r, 0, q + token * q_stride + (head * group + r % group) * dim, dim);
    scratch.sums[2 * r] = -INFINITY;
  }
  alignas(64) float out[kMaxRows * 32];
  const long end = position(query_rows - 1) + 1;
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
    for (long b = 0; b < packed.blocks; ++b) {
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
  for (long r = 0; r < query_rows; ++r) {
    const __m512 by = _mm512_set1_ps(1.0f / scratch.sums[2 * r + 1]);
    for (long j = 0; j < dim; j += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + j),
                          narrow(_mm512_mul_ps(
                              _mm512_loadu_ps(scratch.accumulators.data() + r * dim + j), by)));
    put(a.query_starts[s] + task.token_first + r / group, head * group + r % group, result);
  }
}

}  // namespace lectern
