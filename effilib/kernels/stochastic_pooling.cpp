// Stochastic pooling in one pass forward and one backward; see `effilib.methods.stochastic_pooling.draw`, which
// this follows operation by operation. Images lie as (B, H, W, C). Forward: the elements of a window are read
// once, and their running sums stay in the cache. Backward gathers: every pixel is written once, with the
// gradients of those windows that have drawn it, so that nothing is set to 0 before.

#include <vector>

#include "lanes.h"

namespace {

typedef int16_t Shorts __attribute__((vector_size(32)));

Shorts load(const int16_t* p, int64_t m) {
  Shorts s{};
  std::memcpy(&s, p, m * sizeof *p);
  return s;
}

void store(int16_t* p, Ints i, int64_t m) {
  const Shorts s = __builtin_convertvector(i, Shorts);
  std::memcpy(p, &s, m * sizeof *p);
}

struct Axis {  // one side of the geometry
  int64_t size, out, kernel, stride, padding, dilation;
  int64_t pixel(int64_t o, int64_t i) const { return o * stride - padding + i * dilation; }
};

struct Place {  // where an element of a window lies, or what drew a pixel
  int64_t at, number;
};

// Returns whether an element is negative.
template <class Element>
bool forward(const Element* x, const int16_t* bits, Element* s, int16_t* places, Axis y, Axis z, int64_t B, int64_t C,
             int64_t threads) {
  const int64_t K = y.kernel * z.kernel, rows = B * y.out;
  std::vector<char> negative(rows);
  parallel(rows, B * y.size * z.size * C, threads, [&](int64_t begin, int64_t end) {
    std::vector<Place> elements(K);
    std::vector<Floats> a(K + 1), sums(K);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / y.out, o = row % y.out;
      Ints below{};
      for (int64_t p = 0; p < z.out; ++p) {
        for (int64_t k = 0; k < K; ++k) {
          const int64_t h = y.pixel(o, k / z.kernel), w = z.pixel(p, k % z.kernel);
          const bool inside = 0 <= h && h < y.size && 0 <= w && w < z.size;
          elements[k].at = inside ? ((n * y.size + h) * z.size + w) * C : -1;
        }
        blocks(C, [&](int64_t c, auto m) {
          Floats sum{};
          for (int64_t k = 0; k < K; ++k) {
            a[k] = elements[k].at < 0 ? Floats{} : load(x + elements[k].at + c, m);
            below |= a[k] < 0.0f;
            sums[k] = sum = k ? sum + a[k] : a[k];
          }
          const int64_t at = (row * z.out + p) * C + c;
          const Floats u = (__builtin_convertvector(load(bits + at, m), Floats) + 32768.5f) * (1.0f / 65536);
          const Floats t = u * sum;
          Floats drawn = a[0];
          Ints r{};
          for (int64_t k = 0; k < K; ++k) {
            const Ints passed = t >= sums[k];
            drawn = k + 1 < K ? (passed ? a[k + 1] : drawn) : drawn;
            r -= passed;
          }
          store(s + at, sum - sum == 0.0f ? drawn : sum, m);  // a sum that is not finite leaves a trace
          store(places + at, r, m);
        });
      }
      for (int l = 0; l < LANES; ++l) negative[row] |= below[l] != 0;
    }
  });
  return std::count(negative.begin(), negative.end(), 1);
}

template <class Element>
void backward(const Element* ds, const int16_t* places, Element* dx, Axis y, Axis z, int64_t B, int64_t C,
              int64_t threads) {
  parallel(B * y.size, B * y.size * z.size * C, threads, [&](int64_t begin, int64_t end) {
    std::vector<Place> windows(y.kernel * z.kernel);  // those that a pixel lies in
    for (int64_t row = begin; row < end; ++row)
      for (int64_t w = 0; w < z.size; ++w) {
        const int64_t n = row / y.size, h = row % y.size;
        int64_t found = 0;
        for (int64_t i = 0; i < y.kernel; ++i) {
          const int64_t up = h + y.padding - i * y.dilation, o = up / y.stride;
          if (up < 0 || up % y.stride || o >= y.out) continue;
          for (int64_t j = 0; j < z.kernel; ++j) {
            const int64_t left = w + z.padding - j * z.dilation, p = left / z.stride;
            if (left < 0 || left % z.stride || p >= z.out) continue;
            windows[found++] = {((n * y.out + o) * z.out + p) * C, i * z.kernel + j};
          }
        }
        blocks(C, [&](int64_t c, auto m) {
          Floats sum{};
          for (int64_t k = 0; k < found; ++k) {
            const Shorts drawn = load(places + windows[k].at + c, m) == int16_t(windows[k].number);
            const Words mask = (Words)__builtin_convertvector(drawn, Ints);
            sum += (Floats)((Words)load(ds + windows[k].at + c, m) & mask);
          }
          store(dx + (row * z.size + w) * C + c, sum, m);
        });
      }
  });
}

}  // namespace

extern "C" {

// g: per side its size, number of windows, kernel, stride, padding and dilation.
#define DEFINE(SUFFIX, ELEMENT)                                                                                   \
  int forward_##SUFFIX(const void* x, const int16_t* bits, void* s, int16_t* places, const int64_t* g, int64_t B, \
                       int64_t C, int64_t threads) {                                                              \
    return forward((const ELEMENT*)x, bits, (ELEMENT*)s, places, {g[0], g[1], g[2], g[3], g[4], g[5]},            \
                   {g[6], g[7], g[8], g[9], g[10], g[11]}, B, C, threads);                                        \
  }                                                                                                               \
  void backward_##SUFFIX(const void* ds, const int16_t* places, void* dx, const int64_t* g, int64_t B, int64_t C, \
                         int64_t threads) {                                                                       \
    backward((const ELEMENT*)ds, places, (ELEMENT*)dx, {g[0], g[1], g[2], g[3], g[4], g[5]},                      \
             {g[6], g[7], g[8], g[9], g[10], g[11]}, B, C, threads);                                              \
  }

DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
}
