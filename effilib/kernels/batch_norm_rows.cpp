// Backward pass of batch normalization over some samples of a batch, each with a weight of its own; see
// `effilib.backward.batch_norm_backward`. Images lie as (N, H, W, C). x is read where it lies in
// the whole batch, so that nothing is copied; sums are taken sample by sample, so that threads change nothing.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int SUMS = 4;
constexpr int64_t SHARE = 1 << 17;  // elements below which a thread of its own costs more than it saves

typedef float Floats __attribute__((vector_size(64)));
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

// By OpenMP, whose threads are PyTorch's: others would compete with these, which wait for work busily.
template <class F>
void parallel(int64_t n, int64_t threads, F f) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < threads; ++t) f(t * n / threads, (t + 1) * n / threads);
}

template <class Element>
void run(const Element* g, const Element* x, const int64_t* index, const float* weight, const float* mean,
         const float* invstd, const float* gamma, float eps, Element* dx, float* dgamma, float* dbeta, int64_t n,
         int64_t pixels, int64_t C, int64_t threads) {
  threads = std::clamp<int64_t>(n * pixels * C / SHARE, 1, std::min(threads, n));
  std::vector<float> sums(n * SUMS * C), a(C), b(C), scale(C);

  parallel(n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < C; c += LANES) {
        const int64_t m = std::min<int64_t>(LANES, C - c);
        const Element *gi = g + i * pixels * C + c, *xi = x + index[i] * pixels * C + c;
        const Floats mu = load(mean + c, m), is = load(invstd + c, m);
        Floats sg{}, sgx{}, sx{}, sxx{};
        auto add = [&](Floats dy, Floats value) {
          const Floats xhat = (value - mu) * is;
          sg += dy;
          sgx += dy * xhat;
          sx += xhat;
          sxx += xhat * xhat;
        };
        if (m == LANES)
          for (int64_t j = 0; j < pixels * C; j += C) add(load(gi + j), load(xi + j));
        else
          for (int64_t j = 0; j < pixels * C; j += C) add(load(gi + j, m), load(xi + j, m));
        float* to = &sums[i * SUMS * C + c];
        store(to, sg, m), store(to + C, sgx, m), store(to + 2 * C, sx, m), store(to + 3 * C, sxx, m);
      }
  });

  for (int64_t c = 0; c < C; ++c) {
    double S0 = 0, S1 = 0, S2 = 0, T0 = 0, T1 = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float* of = &sums[i * SUMS * C + c];
      T0 += of[0], T1 += of[C];
      S0 += weight[i] * double(pixels), S1 += weight[i] * double(of[2 * C]), S2 += weight[i] * double(of[3 * C]);
    }
    S2 += S0 * eps * invstd[c] * invstd[c];
    const double det = S0 * S2 - S1 * S1;
    a[c] = (S2 * T0 - S1 * T1) / det, b[c] = (S0 * T1 - S1 * T0) / det;
    scale[c] = gamma[c] * invstd[c];
    dbeta[c] = T0, dgamma[c] = T1;
  }

  parallel(n, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < C; c += LANES) {
        const int64_t m = std::min<int64_t>(LANES, C - c);
        const Element *gi = g + i * pixels * C + c, *xi = x + index[i] * pixels * C + c;
        Element* to = dx + i * pixels * C + c;
        const Floats k = load(&scale[c], m), slope = load(&b[c], m) * load(invstd + c, m) * weight[i] * k;
        const Floats shift = load(&a[c], m) * weight[i] * k - slope * load(mean + c, m);
        if (m == LANES)
          for (int64_t j = 0; j < pixels * C; j += C) store(to + j, k * load(gi + j) - shift - slope * load(xi + j));
        else
          for (int64_t j = 0; j < pixels * C; j += C)
            store(to + j, k * load(gi + j, m) - shift - slope * load(xi + j, m), m);
      }
  });
}

}  // namespace

extern "C" {

#define DEFINE(NAME, ELEMENT)                                                                                     \
  void NAME(const void* g, const void* x, const int64_t* index, const float* weight, const float* mean,           \
            const float* invstd, const float* gamma, float eps, void* dx, float* dgamma, float* dbeta, int64_t n, \
            int64_t pixels, int64_t C, int64_t threads) {                                                         \
    run(static_cast<const ELEMENT*>(g), static_cast<const ELEMENT*>(x), index, weight, mean, invstd, gamma, eps,  \
        static_cast<ELEMENT*>(dx), dgamma, dbeta, n, pixels, C, threads);                                         \
  }

DEFINE(batch_norm_rows_float32, float)
DEFINE(batch_norm_rows_bfloat16, uint16_t)
}
