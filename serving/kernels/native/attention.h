// Attention over paged keys and values: a team of threads takes one task after the other.
#pragma once

#include "decode_attention.h"
#include "prefill_attention.h"

namespace lectern {

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
