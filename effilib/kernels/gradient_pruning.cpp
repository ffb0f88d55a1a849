// Pruning of gradients in one pass (Ye et al. 2019, arXiv:1908.00173): g' = g where |g| >= tau, else tau with the
// sign of g with probability |g| / tau, else 0. On the way it sums what the threshold and the record need.
//
// A random number is a hash of the seed and of the element's place, so that no result depends on the number of
// threads. Vectors are GCC's and Clang's own: they become whatever the processor has.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int SUMS = 5;
constexpr int64_t PIECE = 1 << 12;   // elements that are summed in fp32; from there on fp64
constexpr int64_t SHARE = 32;        // pieces below which a thread of its own costs more than it saves

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct Float32 {
  typedef uint32_t Element;
  static Words load(const Element* p) {
    Words w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  static void store(Element* p, Words w) { std::memcpy(p, &w, sizeof w); }
};

struct BFloat16 {  // the upper half of a float
  typedef uint16_t Element;
  static Words load(const Element* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Words) << 16;
  }
  static void store(Element* p, Words w) {
    Halves h = __builtin_convertvector(w >> 16, Halves);
    std::memcpy(p, &h, sizeof h);
  }
};

struct Sums {
  Floats magnitude{}, product{}, square{}, pruned{};
  Ints zeros{};

  void add_to(double* to) const {
    for (int i = 0; i < LANES; ++i) {
      to[0] += magnitude[i];
      to[1] -= zeros[i];  // a comparison that holds is -1
      to[2] += product[i];
      to[3] += square[i];
      to[4] += pruned[i];
    }
  }
};

Words hash(Words h, uint32_t a, uint32_t b) {  // murmur3's finalizer, with a key at two places
  h += a;
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= b;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  return h ^ (h >> 16);
}

Words prune(Words g, Words place, float tau, uint32_t a, uint32_t b, Sums& sums) {
  const Words sign = g & 0x80000000u, bits = g & 0x7fffffffu;
  const Floats magnitude = (Floats)bits;
  const Floats r = __builtin_convertvector((Ints)(hash(place, a, b) >> 8), Floats) * (0x1p-24f * tau);
  const Words level = (Words)(Floats{} + tau);
  const Words small = (Words)(magnitude < tau);  // not so for nan, which stays to be seen
  const Words after = (small & (Words)(magnitude > r) & level) | (~small & bits);
  sums.magnitude += magnitude;
  sums.zeros += (Ints)(after == 0u);
  sums.product += magnitude * (Floats)after;
  sums.square += magnitude * magnitude;
  sums.pruned += (Floats)after * (Floats)after;
  return after | sign;
}

template <class Format>
void run(const void* g, void* out, int64_t n, float tau, uint64_t seed, double* sums, int64_t threads) {
  using Element = typename Format::Element;
  const Element* from = static_cast<const Element*>(g);
  Element* to = static_cast<Element*>(out);
  const uint32_t a = seed, b = seed >> 32;
  const int64_t pieces = (n + PIECE - 1) / PIECE;
  std::vector<double> of(pieces * SUMS);
  Words lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;

  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      Sums found;
      const int64_t last = std::min(n, (piece + 1) * PIECE);
      int64_t i = piece * PIECE;
      for (; i + LANES <= last; i += LANES)
        Format::store(to + i, prune(Format::load(from + i), lanes + (uint32_t)i, tau, a, b, found));
      if (i < last) {
        Element rest[LANES] = {};
        std::memcpy(rest, from + i, (last - i) * sizeof(Element));
        Format::store(rest, prune(Format::load(rest), lanes + (uint32_t)i, tau, a, b, found));
        std::memcpy(to + i, rest, (last - i) * sizeof(Element));
        of[piece * SUMS + 1] -= LANES - (last - i);  // what only fills the vector is no zero of g
      }
      found.add_to(&of[piece * SUMS]);
    }
  };
  threads = std::clamp<int64_t>(pieces / SHARE, 1, threads);
  // by OpenMP, whose threads are PyTorch's: others would compete with these, which wait for work busily
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t t = 0; t < threads; ++t) work(t * pieces / threads, (t + 1) * pieces / threads);
  std::fill(sums, sums + SUMS, 0.0);
  for (int64_t i = 0; i < pieces * SUMS; ++i) sums[i % SUMS] += of[i];
}

}  // namespace

extern "C" {

// sums: |g|, how many elements become 0, g g', g^2, g'^2. tau is exact in the format; 0 prunes nothing.
void prune_float32(const void* g, void* out, int64_t n, float tau, uint64_t seed, double* sums, int64_t threads) {
  run<Float32>(g, out, n, tau, seed, sums, threads);
}

void prune_bfloat16(const void* g, void* out, int64_t n, float tau, uint64_t seed, double* sums, int64_t threads) {
  run<BFloat16>(g, out, n, tau, seed, sums, threads);
}
}
