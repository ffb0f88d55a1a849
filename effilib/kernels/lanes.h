// What the kernels share: 16 numbers at a time, as fp32 whatever they are in memory, and threads. Vectors are GCC's
// and Clang's own: they become whatever the processor has.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int LANES = 16;
constexpr int64_t SHARE = 1 << 16;  // elements below which a thread of its own costs more than it saves

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

Floats load(const float* p, int64_t m = LANES) {
  Floats f{};
  std::memcpy(&f, p, m * sizeof *p);
  return f;
}

Floats load(const uint16_t* p, int64_t m = LANES) {  // bfloat16
  Halves h{};
  std::memcpy(&h, p, m * sizeof *p);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

void store(float* p, Floats f, int64_t m = LANES) { std::memcpy(p, &f, m * sizeof *p); }

void store(uint16_t* p, Floats f, int64_t m = LANES) {  // rounded to the nearest, ties to even
  Words w = (Words)f;
  const Words nan = (Words)(f != f);
  w = (nan & (w | 0x400000u)) | (~nan & (w + 0x7fffu + ((w >> 16) & 1u)));
  Halves h = __builtin_convertvector(w >> 16, Halves);
  std::memcpy(p, &h, m * sizeof *p);
}

// f(channel, number of lanes); all lanes are there but in the last block, which the compiler sees as a constant
template <class F>
void blocks(int64_t C, F f) {
  int64_t c = 0;
  for (; c + LANES <= C; c += LANES) f(c, std::integral_constant<int64_t, LANES>());
  if (c < C) f(c, C - c);
}

// f(begin, end), by OpenMP, whose threads are PyTorch's: others would compete with these, which wait for work busily.
template <class F>
void parallel(int64_t n, int64_t elements, int64_t threads, F f) {
  threads = std::clamp<int64_t>(elements / SHARE, 1, std::max<int64_t>(1, std::min(threads, n)));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < threads; ++t) f(t * n / threads, (t + 1) * n / threads);
}

template <class F>
void each(int64_t n, int64_t elements, int64_t threads, F f) {  // f(i)
  parallel(n, elements, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace
