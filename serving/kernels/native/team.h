// A team of threads taken from the caller's OpenMP pool, its barrier and its shared work counters.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>

namespace lectern {

using bf16 = uint16_t;

// The entry points of the OpenMP runtime that is already in the process, handed over by the
// loader. Sharing that pool means there is never a second set of spinning threads.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};
inline OpenMP openmp;

struct alignas(64) Counter {
  std::atomic<long> value{0};
};

struct Shared {
  explicit Shared(int operations) : counters(new Counter[operations]) {}
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> phase{0};
  std::unique_ptr<Counter[]> counters;
};

// One thread's view of the team. Every thread must call barrier() and counter() in the same order.
struct Team {
  int id, size;
  Shared& shared;
  int operation = 0;

  // A counter that starts at zero, the same one for all threads at the same call.
  std::atomic<long>& counter() { return shared.counters[operation++].value; }

  void barrier() {
    if (size == 1) return;
    const int phase = shared.phase.load(std::memory_order_relaxed);
    if (shared.arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      shared.arrived.store(0, std::memory_order_relaxed);
      shared.phase.store(phase + 1, std::memory_order_release);
      return;
    }
    // Another process may hold the core that a teammate needs: spin briefly, then give way.
    for (long spins = 0; shared.phase.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 20000) {
        _mm_pause();
      } else {
        sched_yield();
      }
    }
  }

  // The half-open share of n items that belongs to this thread.
  void share(long n, long& first, long& last) const {
    first = n * id / size;
    last = n * (id + 1) / size;
  }
};

template <class Body>
void with_team(int threads, int operations, Body body) {
  Shared shared(operations);
  if (threads <= 1 || openmp.parallel == nullptr) {
    Team team{0, 1, shared};
    body(team);
    return;
  }
  struct Call {
    Shared* shared;
    Body* body;
  } call{&shared, &body};
  openmp.parallel(
      [](void* data) {
        Call* c = static_cast<Call*>(data);
        Team team{openmp.thread_num(), openmp.num_threads(), *c->shared};
        (*c->body)(team);
      },
      &call, static_cast<unsigned>(threads), 0);
}

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

inline __m512 load16(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m512 load16(const bf16* p, __mmask16 mask) {
  return mask == 0xffff ? load16(p) : widen(_mm256_maskz_loadu_epi16(mask, p));
}

inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline void store16(bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x));
}

// A masked store of 16-bit lanes takes dozens of cycles on some processors: only at a row's end.
inline void store16(bf16* p, __mmask16 mask, __m512 x) {
  if (mask == 0xffff) {
    store16(p, x);
  } else {
    _mm256_mask_storeu_epi16(p, mask, narrow(x));
  }
}

inline __mmask16 tail_mask(long left) {
  return left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1u);
}

// exp(x) for x <= 0 (and a little above): 2^n times a polynomial on [-ln2/2, ln2/2], error < 2 ulp.
inline __m512 exp16(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860682030941723e-6f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720.0f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

}  // namespace lectern
