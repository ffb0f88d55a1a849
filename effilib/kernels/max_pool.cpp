// Max pooling of 2 x 2 windows side by side, one pass forward and one backward; see `effilib.pooling`. Images lie as
// (N, H, W, C). Backward every pixel is written once, so that nothing is set to 0 before.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

constexpr int LANES = 16;
constexpr int64_t SHARE = 1 << 17;  // elements below which a thread of its own costs more than it saves

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

Floats load(const float* p, int64_t m) {
  Floats f{};
  std::memcpy(&f, p, m * sizeof *p);
  return f;
}

Floats load(const uint16_t* p, int64_t m) {  // bfloat16
  Halves h{};
  std::memcpy(&h, p, m * sizeof *p);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

void store(float* p, Floats f, int64_t m) { std::memcpy(p, &f, m * sizeof *p); }

void store(uint16_t* p, Floats f, int64_t m) {  // of numbers that were bfloat16
  const Halves h = __builtin_convertvector((Words)f >> 16, Halves);
  std::memcpy(p, &h, m * sizeof *p);
}

template <class F>
void blocks(int64_t C, F f) {
  int64_t c = 0;
  for (; c + LANES <= C; c += LANES) f(c, std::integral_constant<int64_t, LANES>());
  if (c < C) f(c, C - c);
}

// f(n, row of windows), by OpenMP, whose threads are PyTorch's
template <class F>
void rows(int64_t N, int64_t H, int64_t W, int64_t C, int64_t threads, F f) {
  threads = std::clamp<int64_t>(N * H * W * C / SHARE, 1, std::min(threads, N));
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < N; ++n)
    for (int64_t o = 0; o < H / 2; ++o) f(n, o);
}

template <class Element>
void forward(const Element* x, Element* y, int8_t* places, int64_t N, int64_t H, int64_t W, int64_t C,
             int64_t threads) {
  rows(N, H, W, C, threads, [=](int64_t n, int64_t o) {
    for (int64_t p = 0; p < W / 2; ++p) {
      const Element* corner = x + ((n * H + 2 * o) * W + 2 * p) * C;
      const int64_t at = ((n * (H / 2) + o) * (W / 2) + p) * C;
      blocks(C, [&](int64_t c, auto m) {
        Floats most = load(corner + c, m);
        Ints place{};
        for (int k = 1; k < 4; ++k) {
          const Floats v = load(corner + (k / 2 * W + k % 2) * C + c, m);
          const Ints more = (v > most) | (v != v);  // a NaN wins, as PyTorch has it
          most = more ? v : most;
          place = more ? Ints{} + k : place;
        }
        store(y + at + c, most, m);
        const Bytes bytes = __builtin_convertvector(place, Bytes);
        std::memcpy(places + at + c, &bytes, m);
      });
    }
  });
}

template <class Element>
void backward(const Element* dy, const int8_t* places, Element* dx, int64_t N, int64_t H, int64_t W, int64_t C,
              int64_t threads) {
  rows(N, H, W, C, threads, [=](int64_t n, int64_t o) {
    Element* top = dx + (n * H + 2 * o) * W * C;
    for (int64_t p = 0; p < W / 2; ++p) {
      const int64_t at = ((n * (H / 2) + o) * (W / 2) + p) * C;
      blocks(C, [&](int64_t c, auto m) {
        const Floats d = load(dy + at + c, m);
        Bytes bytes{};
        std::memcpy(&bytes, places + at + c, m);
        const Ints place = __builtin_convertvector(bytes, Ints);
        for (int k = 0; k < 4; ++k)
          store(top + (k / 2 * W + 2 * p + k % 2) * C + c, (Floats)((Ints)d & (place == k)), m);
      });
    }
    if (W % 2)
      for (int k = 0; k < 2; ++k) std::memset(top + ((k + 1) * W - 1) * C, 0, C * sizeof(Element));
    if (H % 2 && o == H / 2 - 1) std::memset(top + 2 * W * C, 0, W * C * sizeof(Element));
  });
}

}  // namespace

extern "C" {

#define DEFINE(NAME, ELEMENT)                                                                                     \
  void NAME##_forward(const ELEMENT* x, ELEMENT* y, int8_t* places, int64_t N, int64_t H, int64_t W, int64_t C,   \
                      int64_t threads) {                                                                          \
    forward(x, y, places, N, H, W, C, threads);                                                                   \
  }                                                                                                               \
  void NAME##_backward(const ELEMENT* dy, const int8_t* places, ELEMENT* dx, int64_t N, int64_t H, int64_t W,     \
                       int64_t C, int64_t threads) {                                                              \
    backward(dy, places, dx, N, H, W, C, threads);                                                                \
  }

DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
}
