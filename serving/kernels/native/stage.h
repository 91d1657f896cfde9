// A run of decoder layers in one go: one team of threads, no return to the caller in between.
#pragma once

#include "attention.h"
#include "elementwise.h"

namespace lectern {

struct LayerWeights {
  Matrix qkv, o, gate_up, down;
  const bf16 *input_norm, *post_norm;
  const bf16 *q_norm, *k_norm;       // [head_dim] or null
  const bf16 *qkv_bias, *o_bias;     // or null
  int64_t window;                    // 0: none
};

struct StageCall {
  const LayerWeights* layers;
  bf16* const* kv;                   // one [pages, 2, page_size, kv_heads, head_dim] a layer
  int64_t num_layers, hidden, intermediate;
  float eps;
  bf16* residual;                    // [tokens, hidden], in and out
  int64_t tokens;
  const int64_t *positions, *slots;  // [tokens]
  const float* cos_sin;              // [positions, head_dim]
  bf16* workspace;                   // stage_workspace() elements
  const int64_t* wanted;             // [num_wanted] rows that the caller reads, or null: all
  int64_t num_wanted;
  bf16* result;                      // [num_wanted, hidden]; with null `wanted` read `residual`
};

inline long stage_workspace(long tokens, long hidden, long intermediate, long heads, long kv_heads,
                            long dim) {
  const long widest = std::max({hidden, heads * dim, intermediate}) + 4;
  return tokens * (2 * widest + (heads + 2 * kv_heads) * dim) + 64;
}

// Rotates this token's queries in place and puts its key and value where they belong.
inline void rotate_token(bf16* q, bf16* k, const bf16* v, const bf16* q_norm, const bf16* k_norm,
                         float eps, const float* cos_sin, const Attention& a, bf16* kv, long slot) {
  const long dim = a.head_dim, half = dim / 2;
  for (long h = 0; h < a.heads; ++h)
    rotate_head(q + h * dim, q_norm, eps, cos_sin, half, q + h * dim);
  if (slot < 0) return;
  bf16* to = kv + slot / a.page_size * a.page_elements() +
             slot % a.page_size * a.kv_heads * dim;
  for (long h = 0; h < a.kv_heads; ++h)
    rotate_head(k + h * dim, k_norm, eps, cos_sin, half, to + h * dim);
  std::memcpy(to + a.values_offset(), v, a.kv_heads * dim * sizeof(bf16));
}

struct AddTo {  // residual += product (+ bias)
  bf16* residual;
  long stride, width;
  const bf16* bias;
  void operator()(long first, long rows, long group, const float* out) const {
    for (long half = 0; half < 2; ++half) {
      const long column = group * 32 + half * 16;
      if (column >= width) return;
      const __mmask16 mask = tail_mask(width - column);
      const __m512 extra = bias ? load16(bias + column, mask) : _mm512_setzero_ps();
      for (long r = 0; r < rows; ++r) {
        bf16* to = residual + (first + r) * stride + column;
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(out + 32 * r + half * 16), extra);
        store16(to, mask, _mm512_add_ps(load16(to, mask), sum));
      }
    }
  }
};

struct Store {  // result = product (+ bias), bf16 or float32
  void* result;
  long stride, width;
  const bf16* bias;
  bool wide;
  void operator()(long first, long rows, long group, const float* out) const {
    for (long half = 0; half < 2; ++half) {
      const long column = group * 32 + half * 16;
      if (column >= width) return;
      const __mmask16 mask = tail_mask(width - column);
      const __m512 extra = bias ? load16(bias + column, mask) : _mm512_setzero_ps();
      for (long r = 0; r < rows; ++r) {
        const __m512 sum = _mm512_add_ps(_mm512_load_ps(out + 32 * r + half * 16), extra);
        const long at = (first + r) * stride + column;
        if (wide) {
          _mm512_mask_storeu_ps(static_cast<float*>(result) + at, mask, sum);
        } else {
          store16(static_cast<bf16*>(result) + at, mask, sum);
        }
      }
    }
  }
};

// packed rows = silu(gate) * up, gate and up being the two panels of a tile. The rows are packed in
// the same blocks as those that were multiplied: there are as many.
struct GateInto {
  Rows rows;
  void operator()(long first, long count, long group, const float* out) const {
    alignas(32) uint32_t pairs[8];
    for (long r = 0; r < count; ++r) {
      const __m512 gate = widen(narrow(_mm512_load_ps(out + 32 * r)));
      const __m512 up = widen(narrow(_mm512_load_ps(out + 32 * r + 16)));
      const __m512 gated = _mm512_mul_ps(widen(narrow(silu16(gate))), up);
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), narrow(gated));
      uint32_t* to = rows.place(first, count, first + r, group * 16);
      for (int j = 0; j < 8; ++j) to[j * count] = pairs[j];
    }
  }
};

inline void run_stage(Team& team, const StageCall& call, Attention a,
                      const std::vector<AttentionTask>& tasks) {
  const long tokens = call.tokens, dim = a.head_dim;
  const long q_width = a.heads * dim, kv_width = a.kv_heads * dim;
  const long qkv_width = q_width + 2 * kv_width;
  const long widest = std::max<long>({call.hidden, q_width, call.intermediate}) + 4;
  bf16* x = call.workspace;
  bf16* y = x + tokens * widest;
  bf16* qkv = y + tokens * widest;
  Rows normed(x, tokens, call.hidden), attended(x, tokens, q_width);
  Rows gated(y, tokens, call.intermediate);
  std::vector<bf16> row(call.hidden);
  long first, last;
  team.share(tokens, first, last);
  bf16* residual = call.residual;
  auto norm = [&](const bf16* weight) {
    for (long t = first; t < last; ++t) {
      rms_norm_row(residual + t * call.hidden, weight, call.hidden, call.eps, row.data());
      normed.put_row(t, row.data());
    }
  };
  for (long l = 0; l < call.num_layers; ++l) {
    const LayerWeights& w = call.layers[l];
    a.kv = call.kv[l];
    a.window = w.window;
    norm(w.input_norm);
    team.barrier();
    multiply(team, normed, w.qkv, false, &w.o,
             Store{qkv, qkv_width, qkv_width, w.qkv_bias, false});
    team.barrier();
    for (long t = first; t < last; ++t) {
      bf16* q = qkv + t * qkv_width;
      rotate_token(q, q + q_width, q + q_width + kv_width, w.q_norm, w.k_norm, call.eps,
                   call.cos_sin + call.positions[t] * dim, a, call.kv[l], call.slots[t]);
    }
    team.barrier();
    // Neighbouring rows share cache lines once they are packed, and their tasks may run on two
    // cores: so rows are written plainly first and packed by whole blocks afterwards.
    attend(team, a, tasks, qkv, qkv_width, [&](long r, long head, const bf16* values) {
      std::memcpy(y + r * q_width + head * dim, values, dim * sizeof(bf16));
    });
    team.barrier();
    const int64_t* wanted = l + 1 == call.num_layers ? call.wanted : nullptr;
    if (wanted) {
      // Behind the last attention no row needs another one: only those that are read go on.
      if (call.num_wanted == 0) return;
      residual = call.result;
      normed = Rows(x, call.num_wanted, call.hidden);
      attended = Rows(x, call.num_wanted, q_width);
      gated = Rows(y, call.num_wanted, call.intermediate);
      team.share(call.num_wanted, first, last);
    }
    for (long t = first; t < last; ++t) {
      const long from = wanted ? wanted[t] : t;
      attended.put_row(t, y + from * q_width);
      if (wanted)
        std::memcpy(residual + t * call.hidden, call.residual + from * call.hidden,
                    call.hidden * sizeof(bf16));
    }
    team.barrier();
    multiply(team, attended, w.o, false, nullptr,
             AddTo{residual, call.hidden, call.hidden, w.o_bias});
    team.barrier();
    norm(w.post_norm);
    team.barrier();
    multiply(team, normed, w.gate_up, true, &w.down, GateInto{gated});
    team.barrier();
    multiply(team, gated, w.down, false,
             l + 1 < call.num_layers ? &call.layers[l + 1].qkv : nullptr,
             AddTo{residual, call.hidden, call.hidden, nullptr});
    team.barrier();
  }
}

}  // namespace lectern
