// What attention over paged keys and values works on, and how it is cut into tasks.
//
// kv is [pages, 2, page_size, kv_heads, head_dim] in bf16. head_dim must be a multiple of 32 and at
// most 256.
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

}  // namespace lectern
