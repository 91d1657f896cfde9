// The C interface of the native kernels. All tensors are contiguous unless a stride is given;
// sizes count elements. Nothing here allocates tensors or keeps a pointer after it returns.

#include "draw.h"
#include "stage.h"

using namespace lectern;

extern "C" {

void lectern_openmp(void* parallel, void* thread_num, void* num_threads) {
  openmp.parallel = reinterpret_cast<decltype(openmp.parallel)>(parallel);
  openmp.thread_num = reinterpret_cast<decltype(openmp.thread_num)>(thread_num);
  openmp.num_threads = reinterpret_cast<decltype(openmp.num_threads)>(num_threads);
}

int64_t lectern_packed_elements(int64_t n, int64_t k) {
  const Matrix w{nullptr, n, k};
  return w.panels() * 16 * w.padded_k();
}

void lectern_pack(const bf16* weight, int64_t n, int64_t k, int64_t stride, bf16* out,
                  int threads) {
  const Matrix w{nullptr, n, k};
  with_team(threads, 1, [&](Team& team) {
    long first, last;
    team.share(w.panels(), first, last);
    for (long p = first; p < last; ++p) pack_panel(weight, n, k, stride, p, out);
  });
}

void lectern_rows(const bf16* packed, int64_t n, int64_t k, const int64_t* ids, int64_t count,
                  bf16* out) {
  const Matrix w{packed, n, k};
  for (long i = 0; i < count; ++i) unpack_row(w, ids[i], out + i * k);
}

// workspace: m * (k + 4) elements.
void lectern_linear(const bf16* x, int64_t m, int64_t stride, const bf16* packed, int64_t n,
                    int64_t k, const bf16* bias, void* out, int wide, bf16* workspace,
                    int threads) {
  const Matrix w{packed, n, k};
  const Rows rows(workspace, m, k);
  with_team(threads, 1, [&](Team& team) {
    long first, last;
    team.share(m, first, last);
    for (long r = first; r < last; ++r) rows.put_row(r, x + r * stride);
    team.barrier();
    multiply(team, rows, w, false, nullptr, Store{out, n, n, bias, wide != 0});
  });
}

// residual and total are null for a plain norm; total may be residual.
void lectern_rms_norm(const bf16* x, const bf16* residual, const bf16* weight, int64_t rows,
                      int64_t width, float eps, bf16* out, bf16* total, int threads) {
  with_team(threads, 1, [&](Team& team) {
    long first, last;
    team.share(rows, first, last);
    for (long r = first; r < last; ++r) {
      const bf16* from = x + r * width;
      if (residual != nullptr) {
        add_row(from, residual + r * width, width, total + r * width);
        from = total + r * width;
      }
      rms_norm_row(from, weight, width, eps, out + r * width);
    }
  });
}

void lectern_silu_mul(const bf16* x, int64_t rows, int64_t width, bf16* out, int threads) {
  with_team(threads, 1, [&](Team& team) {
    long first, last;
    team.share(rows, first, last);
    for (long r = first; r < last; ++r)
      silu_mul_row(x + 2 * r * width, x + (2 * r + 1) * width, width, out + r * width);
  });
}

// Rotates q into q_out and writes k and v to their slots; strides are those of a token.
void lectern_rotary(const bf16* q, const bf16* k, const bf16* v, int64_t q_stride, int64_t k_stride,
                    int64_t v_stride, const bf16* q_norm, const bf16* k_norm, float eps,
                    const float* cos_sin, const int64_t* positions, const int64_t* slots,
                    int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
                    int64_t page_size, bf16* kv, bf16* q_out, int threads) {
  Attention a{};
  a.page_size = page_size;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.head_dim = dim;
  with_team(threads, 1, [&](Team& team) {
    long first, last;
    team.share(tokens, first, last);
    for (long t = first; t < last; ++t) {
      bf16* to = q_out + t * heads * dim;
      std::memcpy(to, q + t * q_stride, heads * dim * sizeof(bf16));
      rotate_token(to, const_cast<bf16*>(k + t * k_stride), v + t * v_stride, q_norm, k_norm, eps,
                   cos_sin + positions[t] * dim, a, kv, slots[t]);
    }
  });
}

void lectern_attention(const bf16* q, int64_t q_stride, const Attention* attention, bf16* out,
                       int threads) {
  const Attention& a = *attention;
  const std::vector<AttentionTask> tasks = attention_tasks(a, threads);
  with_team(threads, 1, [&](Team& team) {
    attend(team, a, tasks, q, q_stride, [&](long row, long head, const bf16* values) {
      std::memcpy(out + (row * a.heads + head) * a.head_dim, values, a.head_dim * sizeof(bf16));
    });
  });
}

int64_t lectern_stage_workspace(int64_t tokens, int64_t hidden, int64_t intermediate, int64_t heads,
                                int64_t kv_heads, int64_t dim) {
  return stage_workspace(tokens, hidden, intermediate, heads, kv_heads, dim);
}

void lectern_stage(const StageCall* call, const Attention* attention, int threads) {
  const std::vector<AttentionTask> tasks = attention_tasks(*attention, threads);
  with_team(threads, static_cast<int>(5 * call->num_layers),
            [&](Team& team) { run_stage(team, *call, *attention, tasks); });
}

// logits [rows, vocab]; by: reciprocals of the temperatures; uniform in (0, 1).
void lectern_draw(const float* logits, int64_t rows, int64_t vocab, const float* by,
                  const double* uniform, int64_t* tokens, int threads) {
  const long blocks = (vocab + kDrawBlock - 1) / kDrawBlock, parts = rows < threads ? 8 : 1;
  std::vector<DrawBlock> sums(rows * blocks);
  with_team(threads, 1, [&](Team& team) {
    std::atomic<long>& shares = team.counter();
    for (long i; (i = shares.fetch_add(1, std::memory_order_relaxed)) < rows * parts;) {
      const long row = i / parts, part = i % parts;
      for (long b = blocks * part / parts; b < blocks * (part + 1) / parts; ++b)
        sums[row * blocks + b] =
            sum_block(logits + row * vocab + b * kDrawBlock,
                      std::min(kDrawBlock, vocab - b * kDrawBlock), by[row]);
    }
    team.barrier();
    long first, last;
    team.share(rows, first, last);
    for (long row = first; row < last; ++row)
      tokens[row] = draw_row(logits + row * vocab, vocab, by[row], uniform[row],
                             sums.data() + row * blocks);
  });
}

}  // extern "C"
