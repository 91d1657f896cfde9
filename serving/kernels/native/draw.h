// One token a row from its logits, by the inverse of the cumulative distribution: one pass over the
// logits. Each block of 256 is summed below its own maximum; the sums are then brought below the
// row's. The last step looks only at the block in which the uniform number falls.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "team.h"

namespace lectern {

constexpr long kDrawBlock = 256;

struct DrawBlock {
  float top, sum;
};

inline DrawBlock sum_block(const float* logits, long n, float by) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  for (long j = 0; j < n; j += 16) {
    const __mmask16 mask = tail_mask(n - j);
    top = _mm512_mask_max_ps(top, mask, top, _mm512_maskz_loadu_ps(mask, logits + j));
  }
  const float most = _mm512_reduce_max_ps(top);
  if (!(most > -INFINITY)) return {-INFINITY, 0.0f};
  const __m512 scale = _mm512_set1_ps(by), high = _mm512_set1_ps(most * by);
  __m512 sum = _mm512_setzero_ps();
  for (long j = 0; j < n; j += 16) {
    const __mmask16 mask = tail_mask(n - j);
    const __m512 x = _mm512_maskz_loadu_ps(mask, logits + j);
    sum = _mm512_mask_add_ps(sum, mask, sum, exp16(_mm512_fmsub_ps(x, scale, high)));
  }
  return {most, _mm512_reduce_add_ps(sum)};
}

// The token whose share of the row's mass holds `uniform` in (0, 1); never one without mass.
inline long draw_row(const float* logits, long n, float by, double uniform,
                     const DrawBlock* blocks) {
  const long count = (n + kDrawBlock - 1) / kDrawBlock;
  float top = -INFINITY;
  for (long b = 0; b < count; ++b) top = std::max(top, blocks[b].top);
  if (!(top > -INFINITY)) return 0;
  auto mass = [&](long b) {
    return blocks[b].sum > 0.0f
               ? blocks[b].sum * std::exp((double(blocks[b].top) - double(top)) * double(by))
               : 0.0;
  };
  double total = 0.0;
  for (long b = 0; b < count; ++b) total += mass(b);
  double left = uniform * total;
  long found = 0;
  for (long b = 0; b < count; ++b) {
    const double m = mass(b);
    if (m > 0.0) found = b;
    if (left < m) break;
    left -= m;
  }
  const long first = found * kDrawBlock, last = std::min(n, first + kDrawBlock);
  alignas(64) float parts[kDrawBlock];
  const __m512 scale = _mm512_set1_ps(by), high = _mm512_set1_ps(blocks[found].top * by);
  double inside = 0.0;
  for (long j = 0; j < last - first; j += 16) {
    const __mmask16 mask = tail_mask(last - first - j);
    const __m512 x = _mm512_maskz_loadu_ps(mask, logits + first + j);
    _mm512_store_ps(parts + j, exp16(_mm512_fmsub_ps(x, scale, high)));
  }
  for (long j = 0; j < last - first; ++j) inside += parts[j];
  // Below the block's own maximum now, and below its sum: rounding may have left a little more.
  left = mass(found) > 0.0 ? left / mass(found) * inside : 0.0;
  long token = first;
  for (long j = 0; j < last - first; ++j) {
    if (parts[j] > 0.0f) token = first + j;
    if (left < parts[j]) break;
    left -= parts[j];
  }
  return token;
}

}  // namespace lectern
