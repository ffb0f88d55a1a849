// Convolutions of 16-bit integers by AVX512-VNNI's vpdpwssd: int32 += pair of int16 times pair of int16.
//
// Images lie as (N, H, W, C); samples are copied, with zeros around them, before use. A sum is cut into
// chains that int32 holds for certain, |sum x w| <= largest * sum |w| < 2^31. Chains are added up in float64,
// which is exact too: no result depends on chains, tiles or threads, it is the integer, rounded once.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace {

using std::int16_t, std::int32_t, std::int64_t;

#define INLINE __attribute__((always_inline))  // lambdas too, or arrays would not become registers

constexpr int LANES = 16;            // int32 of a register
constexpr int64_t NEAR = 256 << 10;  // bytes of images that stay in the second-level cache beside the weights
constexpr int64_t BAND = 256;        // pixels of which two operands stay in the first-level cache

struct Shape {  // of a convolution: x (N, H, W, C) and y (N, OH, OW, O)
  int64_t N, H, W, C, OH, OW, O, kh, kw, sh, sw, ph, pw, dh, dw;
};

struct Step {  // products of pairs that follow each other in both operands
  int64_t x, w, pairs;
  bool last;  // of a chain
};

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// How many samples of so many bytes are worked on at once
int64_t samples(int64_t bytes, int64_t N, int64_t threads) {
  return std::clamp<int64_t>(NEAR / bytes, 1, std::max<int64_t>(1, N / threads));
}

// f(begin, end) over 0..n, a range a thread. By OpenMP, whose threads are PyTorch's: others would compete
// with those, which wait actively.
void parallel(int64_t n, int64_t threads, const std::function<void(int64_t, int64_t)>& f) {
  threads = std::max<int64_t>(1, std::min(n, threads));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < threads; ++t) f(t * n / threads, (t + 1) * n / threads);
}

// f(0), f(1), ..., unrolled before arrays become registers
template <int... I, typename F>
INLINE inline void each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
INLINE inline void each(F&& f) {
  each(std::make_integer_sequence<int, N>{}, f);
}
template <int N, int M, typename F>
INLINE inline void each(F&& f) {
  each<N>([&](auto n) INLINE { each<M>([&](auto m) INLINE { f(n, m); }); });
}

__mmask16 first(int64_t n) { return (1u << std::clamp<int64_t>(n, 0, LANES)) - 1; }

// The numbers of the mask, and zeros. Masked accesses of 16-bit numbers are several times slower on Zen 5.
INLINE inline __m256i load16(const void* p, __mmask16 mask) {
  if (mask == 0xffff) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return mask ? _mm256_maskz_loadu_epi16(mask, p) : _mm256_setzero_si256();
}

__m512i pair(const int16_t* p) {  // in all lanes
  int32_t both;
  std::memcpy(&both, p, sizeof both);
  return _mm512_set1_epi32(both);
}

// sum += products of pairs. Not the intrinsic: GCC 12 copies every sum before and after it.
INLINE inline void dot(__m512i& sum, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

__m512d low(__m512i a) { return _mm512_cvtepi32_pd(_mm512_castsi512_si256(a)); }
__m512d high(__m512i a) { return _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(a, 1)); }

// The end of a chain
INLINE inline void add(double* whole, __m512i& sum) {
  _mm512_storeu_pd(whole, _mm512_add_pd(_mm512_loadu_pd(whole), low(sum)));
  _mm512_storeu_pd(whole + 8, _mm512_add_pd(_mm512_loadu_pd(whole + 8), high(sum)));
  sum = _mm512_setzero_si512();
}

// Sums of magnitudes, a lane each, of the pairs in the chain so far
class Chain {
  std::vector<int32_t> sum, more;
  int32_t most;

 public:
  Chain(int64_t lanes, int64_t largest)
      : sum(lanes, 0), more(lanes), most(std::min<int64_t>(INT32_MAX / largest, 1 << 30)) {}
  // Whether a new one begins with these pairs, because |sum x w| <= largest * sum |w| could outgrow int32
  bool ends(const int16_t* pairs, int64_t first, int64_t lanes) {
    __mmask16 above = 0;
    for (int64_t o = 0; o < lanes; o += LANES) {
      const __m512i m = _mm512_dpwssd_epi32(_mm512_setzero_si512(), _mm512_set1_epi16(1),
                                            _mm512_abs_epi16(_mm512_loadu_si512(pairs + 2 * o)));
      const __m512i whole = _mm512_add_epi32(_mm512_loadu_si512(&sum[first + o]), m);
      above |= _mm512_cmpgt_epi32_mask(whole, _mm512_set1_epi32(most));
      _mm512_storeu_si512(&more[first + o], m);
      _mm512_storeu_si512(&sum[first + o], whole);
    }
    return above;
  }
  void begin() { sum = more; }
};

// A part of an image (H, W, C), which may reach beyond it: (rows, columns, width), 0 outside of the image
struct Frame {
  int64_t top, left, rows, columns, width;
  int64_t size() const { return rows * columns * width; }
  void fill(const int16_t* image, int64_t H, int64_t W, int64_t C, int16_t* to) const {
    int64_t w0 = std::max<int64_t>(left, 0), w1 = std::min(left + columns, W);
    for (int64_t r = 0; r < rows; ++r, to += columns * width) {
      int64_t h = top + r;
      if (h < 0 || h >= H || w0 >= w1) {
        std::memset(to, 0, columns * width * sizeof *to);
        continue;
      }
      const int16_t* from = image + (h * W + w0) * C;
      std::memset(to, 0, (w0 - left) * width * sizeof *to);
      int16_t* inner = to + (w0 - left) * width;
      if (width == C) {
        std::memcpy(inner, from, (w1 - w0) * C * sizeof *to);
      } else {
        for (int64_t w = w0; w < w1; ++w, from += C, inner += width) {
          std::memcpy(inner, from, C * sizeof *to);
          std::memset(inner + C, 0, (width - C) * sizeof *to);
        }
        inner = to + (w0 - left) * width;
      }
      std::memset(inner + (w1 - w0) * width, 0, (left + columns - w1) * width * sizeof *to);
    }
  }
};

// y of P pixels and B * LANES output channels
template <int P, int B>
[[gnu::noinline]] void tile(const int16_t* x, int64_t next, const int16_t* w, const std::vector<Step>& plan,
                            float scale, float* y, int64_t y_next, int64_t outputs) {
  __m512i sum[P][B];
  alignas(64) double whole[P][B][LANES];
  bool chains = false;
  each<P, B>([&](auto p, auto b) INLINE { sum[p][b] = _mm512_setzero_si512(); });
  for (const Step& step : plan) {
    const int16_t *ws = w + step.w, *xs[(P + 3) / 4];  // every fourth pixel: few enough for registers
    each<(P + 3) / 4>([&](auto q) INLINE { xs[q] = x + step.x + 4 * q * next; });
    for (int64_t i = 0; i < step.pairs; ++i, ws += 2 * LANES * B) {
      __m512i v[B];
      each<B>([&](auto b) INLINE { v[b] = _mm512_loadu_si512(ws + 2 * LANES * b); });
      each<P>([&](auto p) INLINE {
        const __m512i u = pair(xs[p / 4] + p % 4 * next);
        each<B>([&](auto b) INLINE { dot(sum[p][b], u, v[b]); });
      });
      each<(P + 3) / 4>([&](auto q) INLINE { xs[q] += 2; });
    }
    if (step.last) {
      if (!chains) std::memset(whole, 0, sizeof whole);
      chains = true;
      each<P, B>([&](auto p, auto b) INLINE { add(whole[p][b], sum[p][b]); });
    }
  }
  each<P, B>([&](auto p, auto b) INLINE {
    __m512 f = _mm512_cvtepi32_ps(sum[p][b]);
    if (chains) {
      add(whole[p][b], sum[p][b]);
      f = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_load_pd(whole[p][b]))),
                             _mm512_cvtpd_ps(_mm512_load_pd(whole[p][b] + 8)), 1);
    }
    f = _mm512_mul_ps(f, _mm512_set1_ps(scale));
    float* to = y + p * y_next + b * LANES;
    if (outputs - b * LANES >= LANES)
      _mm512_storeu_ps(to, f);
    else
      _mm512_mask_storeu_ps(to, first(outputs - b * LANES), f);
  });
}

// A row of `count` pixels in tiles, each half as wide as the one before
template <int P, int B>
void tiles(int64_t count, const int16_t* x, int64_t next, const int16_t* w, const std::vector<Step>& plan,
           float scale, float* y, int64_t y_next, int64_t outputs) {
  for (; count >= P; count -= P, x += P * next, y += P * y_next)
    tile<P, B>(x, next, w, plan, scale, y, y_next, outputs);
  if constexpr (P > 1) tiles<P / 2, B>(count, x, next, w, plan, scale, y, y_next, outputs);
}

struct Tap {
  int64_t row, column, index;
};

// The outputs at rows r, r + sh, ... and columns q, q + sw, ...: they read the same taps.
struct Phase {
  int64_t r, q;
  std::vector<Tap> taps;
};

std::vector<Phase> phases(const Shape& s, bool transposed) {
  std::vector<Phase> found;
  for (int64_t r = 0; r < (transposed ? s.sh : 1); ++r)
    for (int64_t q = 0; q < (transposed ? s.sw : 1); ++q) {
      Phase phase{r, q, {}};
      for (int64_t i = 0; i < s.kh; ++i)
        for (int64_t j = 0; j < s.kw; ++j) {
          int64_t row = i * s.dh - s.ph, column = j * s.dw - s.pw, index = i * s.kw + j;
          if (!transposed) {
            phase.taps.push_back({row, column, index});
          } else if ((r - row) % s.sh == 0 && (q - column) % s.sw == 0) {
            phase.taps.push_back({(r - row) / s.sh, (q - column) / s.sw, index});
          }
        }
      found.push_back(phase);
    }
  return found;
}

// Products with one block of outputs, in chains. w: (taps, pairs, lanes, 2)
std::vector<Step> plan(const int16_t* w, const Phase& phase, const Frame& frame, int64_t pairs, int64_t lanes,
                       int64_t largest) {
  std::vector<Step> steps;
  Chain chain(lanes, largest);
  for (const Tap& tap : phase.taps) {
    const int64_t x = ((tap.row - frame.top) * frame.columns + tap.column - frame.left) * frame.width;
    const int64_t at = tap.index * pairs * lanes * 2;
    int64_t begin = 0;
    for (int64_t i = 0; i < pairs; ++i) {
      if (chain.ends(w + at + i * lanes * 2, 0, lanes)) {
        steps.push_back({x + 2 * begin, at + begin * lanes * 2, i - begin, true});
        begin = i;
        chain.begin();
      }
    }
    steps.push_back({x + 2 * begin, at + begin * lanes * 2, pairs - begin, false});
  }
  return steps;
}

template <int P, int B>
void convolve_blocks(const int16_t* x, const int16_t* w, const Shape& s, bool transposed, int64_t largest,
                     float scale, float* y, int64_t threads) {
  const int64_t in_h = transposed ? 1 : s.sh, in_w = transposed ? 1 : s.sw;  // from one output to the next
  const int64_t out_h = transposed ? s.sh : 1, out_w = transposed ? s.sw : 1;
  const int64_t pairs = (s.C + 1) / 2, lanes = B * LANES, blocks = (s.O + lanes - 1) / lanes;
  const int64_t block = s.kh * s.kw * pairs * lanes * 2;  // of w
  const auto parts = phases(s, transposed);
  auto rows = [&](const Phase& p) { return (s.OH - p.r + out_h - 1) / out_h; };
  auto columns = [&](const Phase& p) { return (s.OW - p.q + out_w - 1) / out_w; };
  Frame frame{0, 0, 1, 1, 2 * pairs};
  for (const Phase& p : parts)  // what all taps of all outputs read
    for (const Tap& tap : p.taps) {
      int64_t bottom = std::max(frame.top + frame.rows, tap.row + (rows(p) - 1) * in_h + 1);
      int64_t right = std::max(frame.left + frame.columns, tap.column + (columns(p) - 1) * in_w + 1);
      frame.top = std::min(frame.top, tap.row);
      frame.left = std::min(frame.left, tap.column);
      frame.rows = bottom - frame.top;
      frame.columns = right - frame.left;
    }
  std::vector<std::vector<Step>> plans;
  for (const Phase& p : parts)
    for (int64_t b = 0; b < blocks; ++b)
      plans.push_back(plan(w + b * block, p, frame, pairs, lanes, largest));
  const int64_t group = samples(2 * frame.size(), s.N, threads);
  parallel((s.N + group - 1) / group, threads, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> framed(group * frame.size());
    for (int64_t n0 = begin * group; n0 < std::min(end * group, s.N); n0 += group) {
      const int64_t n1 = std::min({n0 + group, end * group, s.N});
      for (int64_t n = n0; n < n1; ++n)
        frame.fill(x + n * s.H * s.W * s.C, s.H, s.W, s.C, framed.data() + (n - n0) * frame.size());
      for (size_t k = 0; k < plans.size(); ++k) {
        const Phase& p = parts[k / blocks];
        const int64_t b = k % blocks;
        for (int64_t n = n0; n < n1; ++n)
          for (int64_t a = 0; a < rows(p); ++a) {
            const int64_t row = (n - n0) * frame.rows + a * in_h;
            const int16_t* from = framed.data() + row * frame.columns * frame.width;
            float* to = y + ((n * s.OH + p.r + a * out_h) * s.OW + p.q) * s.O + b * lanes;
            tiles<P, B>(columns(p), from, in_w * frame.width, w + b * block, plans[k], scale, to, out_w * s.O,
                        s.O - b * lanes);
          }
      }
    }
  });
}

// dW of R input channels and B * LANES output channels, of one tap; sums: (R, outputs)
template <int R, int B>
[[gnu::noinline]] void outer(const int16_t* x, int64_t x_next, const int16_t* dy, int64_t dy_next,
                             const std::vector<Step>& steps, double* sums, int64_t outputs) {
  __m512i sum[R][B];
  each<R, B>([&](auto r, auto b) INLINE { sum[r][b] = _mm512_setzero_si512(); });
  for (const Step& step : steps) {
    const int16_t *xs = x + step.x, *ds = dy + step.w;
    for (int64_t i = 0; i < step.pairs; ++i, xs += x_next, ds += dy_next) {
      __m512i v[B];
      each<B>([&](auto b) INLINE { v[b] = _mm512_loadu_si512(ds + 2 * LANES * b); });
      each<R>([&](auto r) INLINE {
        const __m512i u = pair(xs + 2 * r);
        each<B>([&](auto b) INLINE { dot(sum[r][b], u, v[b]); });
      });
    }
    if (step.last || &step == &steps.back())
      each<R, B>([&](auto r, auto b) INLINE { add(sums + r * outputs + b * LANES, sum[r][b]); });
  }
}

// Two pixels side by side, channel by channel: (a0, b0, a1, b1, ...) of those in the masks, and zeros
INLINE inline __m512i interleave(const int16_t* a, __mmask16 in_a, const int16_t* b, __mmask16 in_b) {
  const __m512i low = _mm512_cvtepu16_epi32(load16(a, in_a));
  const __m512i high = _mm512_cvtepu16_epi32(load16(b, in_b));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

template <int R, int B>
void weight_blocks(const int16_t* dy, const int16_t* x, const Shape& s, int64_t largest, double* dw,
                   int64_t threads) {
  constexpr int64_t WIDE = 2 * LANES, BLOCK = B * WIDE;  // pairs of input channels, and of output channels
  const int64_t outputs = round_up(s.O, B * LANES), pairs = (s.OW + 1) / 2, taps = s.kh * s.kw;
  const Frame frame{-s.ph, -s.pw, (s.OH - 1) * s.sh + (s.kh - 1) * s.dh + 1,
                    (2 * pairs - 1) * s.sw + (s.kw - 1) * s.dw + 1, WIDE};
  const int64_t dy_size = s.OH * pairs * 2 * outputs, dy_block = s.OH * pairs * BLOCK;
  const int64_t group = samples(2 * (frame.size() + dy_size), s.N, threads);
  const int64_t groups = (s.N + group - 1) / group;

  // dy: (N, blocks, OH, pairs, lanes, 2), two pixels of a row side by side; and its chains, in bands of
  // pixels that stay in the first-level cache
  using Bands = std::vector<std::vector<Step>>;
  auto pack = [&](int64_t g, int16_t* paired) {
    Bands bands;
    Chain chain(outputs, largest);
    int64_t pixels = BAND;
    for (int64_t m = 0; m < std::min(group, s.N - g * group); ++m)
      for (int64_t h = 0; h < s.OH; ++h, pixels += s.OW) {
        if (pixels >= BAND) {
          bands.emplace_back();
          chain = Chain(outputs, largest);
          pixels = 0;
        }
        int64_t begun = 0;
        auto push = [&](int64_t end, bool last) {
          bands.back().push_back({m * frame.size() + (h * s.sh * frame.columns + 2 * begun * s.sw) * WIDE,
                                  m * dy_size + (h * pairs + begun) * BLOCK, end - begun, last});
          begun = end;
        };
        for (int64_t i = 0; i < pairs; ++i) {
          const int16_t* pixel = dy + (((g * group + m) * s.OH + h) * s.OW + 2 * i) * s.O;
          bool ends = false;
          for (int64_t o = 0; o < outputs; o += LANES) {
            int16_t* to = paired + m * dy_size + o / (B * LANES) * dy_block + (h * pairs + i) * BLOCK +
                          o % (B * LANES) * 2;
            const __mmask16 in = first(s.O - o);
            _mm512_storeu_si512(to, interleave(pixel + o, in, pixel + s.O + o, 2 * i + 1 < s.OW ? in : 0));
            ends |= chain.ends(to, o, LANES);
          }
          if (ends) {
            push(i, true);
            chain.begin();
          }
        }
        push(pairs, false);
      }
    return bands;
  };
  // Several chunks of inputs read it
  const int64_t chunks = (s.C + LANES - 1) / LANES;
  const bool kept = chunks > 1;
  std::vector<Bands> all(groups);
  std::unique_ptr<int16_t[]> whole(new int16_t[kept ? s.N * dy_size : 0]);
  if (kept)
    parallel(groups, threads, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) all[g] = pack(g, whole.get() + g * group * dy_size);
    });

  // x: LANES input channels at a time, so that sums and images stay near; every pixel with the one that the
  // next output reads
  auto read = [](int64_t size, int64_t k, int64_t dilation, int64_t stride) {
    std::vector<char> found(size);
    for (int64_t at = 0; at < size; ++at)
      for (int64_t i = 0; i < k; ++i) found[at] |= (at - i * dilation) % stride == 0;
    return found;
  };
  const auto rows = read(frame.rows, s.kh, s.dh, s.sh), columns = read(frame.columns, s.kw, s.dw, s.sw);
  std::mutex adding;
  parallel(chunks * groups, threads, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> images(group * frame.size()), own(kept ? 0 : group * dy_size);
    std::vector<double> sums(taps * LANES * outputs, 0.0);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t c = unit / groups * LANES, g = unit % groups;
      const int64_t channels = std::min<int64_t>(LANES, s.C - c);
      for (int64_t n = g * group; n < std::min((g + 1) * group, s.N); ++n)
        for (int64_t r = 0; r < frame.rows; ++r) {
          const int64_t h = frame.top + r;
          const int16_t* row = x + (n * s.H + h) * s.W * s.C + c;
          const __mmask16 in = h >= 0 && h < s.H ? first(channels) : 0;
          auto inside = [&](int64_t w) { return w >= 0 && w < s.W ? in : __mmask16(0); };
          int16_t* to = images.data() + (n - g * group) * frame.size() + r * frame.columns * WIDE;
          for (int64_t q = 0; rows[r] && q < frame.columns; ++q, to += WIDE)
            if (columns[q]) {
              const int64_t one = frame.left + q, two = one + s.sw;
              _mm512_storeu_si512(to, interleave(row + one * s.C, inside(one), row + two * s.C, inside(two)));
            }
        }
      const int16_t* paired = kept ? whole.get() + g * group * dy_size : own.data();
      const Bands made = kept ? Bands() : pack(g, own.data());
      for (const auto& band : kept ? all[g] : made)
        for (int64_t o = 0; o < outputs; o += B * LANES)
          for (int64_t t = 0; t < taps; ++t)
            for (int64_t r = 0; r < LANES; r += R)
              outer<R, B>(images.data() + (t / s.kw * s.dh * frame.columns + t % s.kw * s.dw) * WIDE + 2 * r,
                        2 * s.sw * WIDE, paired + o / (B * LANES) * dy_block, BLOCK,
                        band, sums.data() + (t * LANES + r) * outputs + o, outputs);
      if (unit + 1 == end || g + 1 == groups) {  // another thread may have the chunk's other groups
        std::lock_guard<std::mutex> lock(adding);
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t r = 0; r < channels; ++r)
            for (int64_t o = 0; o < s.O; ++o)
              dw[(t * s.C + c + r) * s.O + o] += sums[(t * LANES + r) * outputs + o];
        std::fill(sums.begin(), sums.end(), 0.0);
      }
    }
  });
}

// Rounding

__m512 load(const float* x, __mmask16 mask) {
  return mask == 0xffff ? _mm512_loadu_ps(x) : _mm512_maskz_loadu_ps(mask, x);
}

__m512 load(const uint16_t* x, __mmask16 mask) {  // bf16: the upper half of an fp32
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load16(x, mask)), 16));
}

void store(int16_t* I, __mmask16 mask, __m512i a) {
  const __m256i narrow = _mm512_cvtsepi32_epi16(a);
  if (mask == 0xffff)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(I), narrow);
  else
    _mm256_mask_storeu_epi16(I, mask, narrow);
}

void store(int8_t* I, __mmask16 mask, __m512i a) {
  const __m128i narrow = _mm512_cvtsepi32_epi8(a);
  if (mask == 0xffff)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(I), narrow);
  else
    _mm_mask_storeu_epi8(I, mask, narrow);
}

__m512i hash(__m512i h) {  // lowbias32, by C. Wellons
  h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 16)), _mm512_set1_epi32(0x7feb352d));
  h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 15)), _mm512_set1_epi32(int(0x846ca68b)));
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
}

// I = round(x 2^scf), and the largest magnitude of x in the same pass: as bits, so that nan is above all.
template <typename In, typename Out, bool STOCHASTIC>
int32_t round_all(const In* x, int64_t n, int scf, uint32_t seed, Out* I, int64_t threads) {
  constexpr int64_t PIECE = 1 << 14;
  const __m512 power = _mm512_set1_ps(std::ldexp(1.0f, scf));
  int32_t largest = 0;
  std::mutex finding;
  parallel((n + PIECE - 1) / PIECE, threads, [&](int64_t begin, int64_t end) {
    __m512i top = _mm512_setzero_si512();
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = begin * PIECE; i < std::min(end * PIECE, n); i += LANES) {
      const __mmask16 mask = first(n - i);
      const __m512 value = load(x + i, mask);
      const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
      top = _mm512_max_epi32(top, magnitude);
      __m512 scaled = _mm512_mul_ps(value, power);
      if constexpr (STOCHASTIC) {
        const __m512i h = hash(_mm512_add_epi32(lane, _mm512_set1_epi32(uint32_t(i) + seed)));
        const __m512 u = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(h, 8)), _mm512_set1_ps(0x1p-24f));
        const __m512 floor = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        const __mmask16 up = _mm512_cmp_ps_mask(u, _mm512_sub_ps(scaled, floor), _CMP_LT_OQ);
        scaled = _mm512_mask_add_ps(floor, up, floor, _mm512_set1_ps(1));
      }
      store(I + i, mask, _mm512_cvtps_epi32(scaled));
    }
    std::lock_guard<std::mutex> lock(finding);
    largest = std::max(largest, _mm512_reduce_max_epi32(top));
  });
  return largest;
}

template <typename In, typename Out>
int quantise_as(const In* x, int64_t n, int bits, int guess, bool stochastic, uint32_t seed, Out* I,
                int64_t threads) {
  for (int scf = guess;;) {
    const int32_t top = stochastic ? round_all<In, Out, true>(x, n, scf, seed, I, threads)
                                   : round_all<In, Out, false>(x, n, scf, seed, I, threads);
    if (top >= 0x7f800000) return INT32_MIN;  // inf or nan
    float m;
    std::memcpy(&m, &top, sizeof m);
    int E;
    const float largest = float((1 << (bits - 1)) - 1);
    std::frexp(m, &E);
    int right = std::min(bits - 1 - E, 126);  // 2^127 is the largest power of two
    const float rounded = std::ldexp(m, right);
    right -= stochastic ? rounded > largest : rounded >= largest + 0.5f;
    if (right == scf) return scf;
    scf = right;
  }
}

}  // namespace

extern "C" {


// Returns scf, or INT32_MIN where x is not finite. guess: the exponent that is tried first; a right one costs
// one pass instead of two.
int quantise(const void* x, int bf16, int64_t n, int bits, int guess, int stochastic, uint32_t seed, void* I,
             int64_t threads) {
  auto a = static_cast<const float*>(x);
  auto b = static_cast<const uint16_t*>(x);
  auto narrow = static_cast<int8_t*>(I);
  auto wide = static_cast<int16_t*>(I);
  if (bits <= 8)
    return bf16 ? quantise_as(b, n, bits, guess, stochastic, seed, narrow, threads)
                : quantise_as(a, n, bits, guess, stochastic, seed, narrow, threads);
  return bf16 ? quantise_as(b, n, bits, guess, stochastic, seed, wide, threads)
              : quantise_as(a, n, bits, guess, stochastic, seed, wide, threads);
}

// y = x * w, or with `transposed` its adjoint: then x is dy and y is dX. shape: a `Shape`, of x and y as they
// stand here. w: (blocks of outputs, taps, pairs of inputs, lanes, 2) with 16 or 32 lanes.
void convolve(const int16_t* x, const int16_t* w, const int64_t* shape, int transposed, int64_t lanes,
              int64_t largest, float scale, float* y, int64_t threads) {
  Shape s;
  std::memcpy(&s, shape, sizeof s);
  if (lanes == LANES)
    convolve_blocks<16, 1>(x, w, s, transposed, largest, scale, y, threads);
  else
    convolve_blocks<8, 2>(x, w, s, transposed, largest, scale, y, threads);
}

// dw (taps, C, O) += sum over pixels of dy x
void weight_gradient(const int16_t* dy, const int16_t* x, const int64_t* shape, int64_t largest, double* dw,
                     int64_t threads) {
  Shape s;
  std::memcpy(&s, shape, sizeof s);
  if (s.O <= LANES)
    weight_blocks<16, 1>(dy, x, s, largest, dw, threads);
  else
    weight_blocks<8, 2>(dy, x, s, largest, dw, threads);
}
}
