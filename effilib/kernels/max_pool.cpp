// Max pooling of 2 x 2 windows side by side, one pass forward and one backward; see `effilib.pooling`. Images lie as
// (N, H, W, C). Backward every pixel is written once, so that nothing is set to 0 before.

#include "lanes.h"

namespace {

typedef int8_t Bytes __attribute__((vector_size(16)));

template <class Element>
void forward(const Element* x, Element* y, int8_t* places, int64_t N, int64_t H, int64_t W, int64_t C,
             int64_t threads) {
  each(N * (H / 2), N * H * W * C, threads, [=](int64_t row) {
    const int64_t n = row / (H / 2), o = row % (H / 2);
    for (int64_t p = 0; p < W / 2; ++p) {
      const Element* corner = x + ((n * H + 2 * o) * W + 2 * p) * C;
      const int64_t at = (row * (W / 2) + p) * C;
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
  each(N * (H / 2), N * H * W * C, threads, [=](int64_t row) {
    const int64_t n = row / (H / 2), o = row % (H / 2);
    Element* top = dx + (n * H + 2 * o) * W * C;
    for (int64_t p = 0; p < W / 2; ++p) {
      const int64_t at = (row * (W / 2) + p) * C;
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
