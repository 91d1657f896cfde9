// Norms, rotary embedding and the gate of the feed-forward part, on bf16 rows.
#pragma once

#include "team.h"

namespace lectern {

// out = x / sqrt(mean(x^2) + eps) * weight over n values, the mean in float32.
inline void rms_norm_row(const bf16* x, const bf16* weight, long n, float eps, bf16* out) {
  __m512 sum = _mm512_setzero_ps();
  for (long j = 0; j < n; j += 16) {
    const __m512 v = load16(x + j, tail_mask(n - j));
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  const float scale = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / n + eps);
  for (long j = 0; j < n; j += 16) {
    const __mmask16 mask = tail_mask(n - j);
    // Rounded before the weight is applied, as the reference does.
    const __m512 v = widen(narrow(_mm512_mul_ps(load16(x + j, mask), _mm512_set1_ps(scale))));
    store16(out + j, mask, _mm512_mul_ps(v, load16(weight + j, mask)));
  }
}

inline void add_row(const bf16* x, const bf16* y, long n, bf16* out) {
  for (long j = 0; j < n; j += 16) {
    const __mmask16 mask = tail_mask(n - j);
    store16(out + j, mask, _mm512_add_ps(load16(x + j, mask), load16(y + j, mask)));
  }
}

inline __m512 silu16(__m512 x) {
  // x / (1 + exp(-x)); exp16 takes what is below zero, so use exp(-|x|) on both sides.
  const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 top = _mm512_mask_mov_ps(one, negative, e);
  return _mm512_div_ps(_mm512_mul_ps(x, top), _mm512_add_ps(one, e));
}

inline void silu_mul_row(const bf16* gate, const bf16* up, long n, bf16* out) {
  for (long j = 0; j < n; j += 16) {
    const __mmask16 mask = tail_mask(n - j);
    const __m512 s = widen(narrow(silu16(load16(gate + j, mask))));
    store16(out + j, mask, _mm512_mul_ps(s, load16(up + j, mask)));
  }
}

// Rotates one head in place: pairs (x[i], x[i + half]) by the angle whose cosine and sine are
// cos_sin[i] and cos_sin[half + i]. An optional norm weight [2 * half] is applied before.
inline void rotate_head(const bf16* x, const bf16* norm, float eps, const float* cos_sin, long half,
                        bf16* out) {
  bf16 normed[1024];
  if (norm != nullptr) {
    rms_norm_row(x, norm, 2 * half, eps, normed);
    x = normed;
  }
  for (long j = 0; j < half; j += 16) {
    const __mmask16 mask = tail_mask(half - j);
    const __m512 a = load16(x + j, mask), b = load16(x + half + j, mask);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cos_sin + j);
    const __m512 s = _mm512_maskz_loadu_ps(mask, cos_sin + half + j);
    const __m512 first = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s));
    const __m512 second = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
    store16(out + j, mask, first);
    store16(out + half + j, mask, second);
  }
}

}  // namespace lectern
