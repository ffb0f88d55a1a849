// Batch normalization in as few passes over memory as there can be; see `effilib.normalization`. Images lie as
// (N, H, W, C). Forward: y = relu(gamma xhat + beta + r) in two passes, of which the first only sums; r may be
// missing, and the ReLU be a GELU, a SiLU or nothing. Backward the same, also for some samples of a batch, each
// with a weight of its own: these are read where they lie in the whole batch. Sums are taken image by image, so
// that threads change nothing.

#include <cmath>
#include <vector>

#include "lanes.h"

namespace {

Floats exponential(Floats x) {  // of x <= 0, to 2e-7 of itself; 0 becomes 1, and what is below -87 1e-38
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const float magic = 12582912;  // 1.5 * 2^23: adding it rounds to whole numbers
  const Floats rounded = x * 1.44269504f + magic, k = rounded - magic;
  const Floats f = x - k * 0.693359375f + k * 2.12194440e-4f;
  const Floats p = ((((0.00833333f * f + 0.0416667f) * f + 0.1666667f) * f + 0.5f) * f + 1.0f) * f + 1.0f;
  return p * (Floats)(((Words)rounded - 0x4b400000u + 127u) << 23);
}

// What follows the sum: its value at z, and a gradient dy times its slope there. NaNs stay.
struct Nothing {
  static Floats value(Floats z) { return z; }
  static Floats gradient(Floats, Floats dy) { return dy; }
};

struct ReLU {
  static Floats value(Floats z) { return gradient(z, z); }
  static Floats gradient(Floats z, Floats dy) { return (Floats)((Words)dy & ~(Words)(z <= 0)); }
};

struct GELU {  // z Phi(z), Phi by Abramowitz & Stegun 7.1.26, to 1e-7
  static Floats density(Floats z) { return exponential(-0.5f * z * z); }
  static Floats share(Floats z, Floats density) {
    const Floats t = 1.0f / (1.0f + 0.231641888f * (z < 0 ? -z : z));
    const Floats p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const Floats tail = 0.5f * p * density;
    return z < 0 ? tail : 1.0f - tail;
  }
  static Floats value(Floats z) { return z * share(z, density(z)); }
  static Floats gradient(Floats z, Floats dy) {
    const Floats d = density(z);
    return dy * (share(z, d) + 0.398942280f * z * d);
  }
};

struct SiLU {  // z / (1 + exp(-z))
  static Floats sigmoid(Floats z) {
    const Floats e = exponential(z < 0 ? z : -z);
    return (z < 0 ? e : Floats{} + 1.0f) / (1.0f + e);
  }
  static Floats value(Floats z) { return z * sigmoid(z); }
  static Floats gradient(Floats z, Floats dy) {
    const Floats s = sigmoid(z);
    return dy * s * (1.0f + z * (1.0f - s));
  }
};

// Sums over an image's pixels, K numbers a channel. terms(channel, lanes) returns what adds a pixel's to some sums;
// there are two of each, for one chain of additions would wait for itself.
template <int K, class F>
void sums(int64_t pixels, int64_t C, float* to, F terms) {
  blocks(C, [&](int64_t c, auto m) {
    const auto add = terms(c, m);
    Floats even[K]{}, odd[K]{};
    int64_t j = c;
    for (; j + C < pixels * C; j += 2 * C) add(j, even), add(j + C, odd);
    if (j < pixels * C) add(j, even);
    for (int k = 0; k < K; ++k) store(to + k * C + c, even[k] + odd[k], m);
  });
}

template <bool ADD, class Act, class Element>
void forward(const Element* x, const Element* r, Element* y, const float* gamma, const float* beta, float eps,
             float* mean, float* var, float* invstd, int64_t n, int64_t pixels, int64_t C, int64_t threads) {
  std::vector<float> found(n * 2 * C), near(C), scale(C), shift(C);
  sums<1>(pixels, C, near.data(), [&](int64_t c, auto m) {
    return [=](int64_t j, Floats* s) { s[0] += load(x + j, m); };
  });
  for (float& value : near) value /= pixels;  // squares are taken around the first image's mean: they don't cancel

  each(n, n * pixels * C, threads, [&](int64_t i) {
    const Element* xi = x + i * pixels * C;
    sums<2>(pixels, C, &found[i * 2 * C], [&](int64_t c, auto m) {
      return [=, centre = load(&near[c], m)](int64_t j, Floats* s) {
        const Floats d = load(xi + j, m) - centre;
        s[0] += d, s[1] += d * d;
      };
    });
  });

  const double count = double(n) * pixels;
  for (int64_t c = 0; c < C; ++c) {
    double s = 0, q = 0;
    for (int64_t i = 0; i < n; ++i) s += found[i * 2 * C + c], q += found[i * 2 * C + C + c];
    const double v = q / count - s / count * (s / count);
    mean[c] = near[c] + s / count, var[c] = v < 0 ? 0 : v, invstd[c] = 1 / std::sqrt(double(var[c]) + eps);
    scale[c] = gamma[c] * invstd[c], shift[c] = beta[c] - mean[c] * scale[c];
  }

  each(n, n * pixels * C, threads, [&](int64_t i) {
    blocks(C, [&](int64_t c, auto m) {
      const Floats a = load(&scale[c], m), b = load(&shift[c], m);
      for (int64_t j = i * pixels * C + c; j < (i + 1) * pixels * C; j += C) {
        Floats z = a * load(x + j, m) + b;
        if (ADD) z += load(r + j, m);
        store(y + j, Act::value(z), m);
      }
    });
  });
}

// dX = scale (dY - w (a + b xhat)), w the samples' weights: `effilib.normalization.batch_norm_backward` has the
// equations. With ADD the ReLU's gradient is what r gets, and lies in dr; without, its place is computed again.
template <bool ADD, class Act, bool WEIGHTED, class Element>
void backward(const Element* g, const Element* x, const Element* y, const int64_t* index, const float* weight,
              const float* gamma, const float* beta, const float* mean, const float* invstd, float eps, Element* dx,
              Element* dr, float* dgamma, float* dbeta, int64_t n, int64_t pixels, int64_t C, int64_t threads) {
  constexpr int K = WEIGHTED ? 4 : 2;
  std::vector<float> found(n * K * C), scale(C), shift(C), a(C), b(C);
  for (int64_t c = 0; c < C; ++c)
    scale[c] = gamma[c] * invstd[c], shift[c] = beta ? beta[c] - mean[c] * scale[c] : 0;
  const auto place = [&](int64_t i) { return (index ? index[i] : i) * pixels * C; };

  each(n, n * pixels * C, threads, [&](int64_t i) {
    const Element *gi = g + i * pixels * C, *xi = x + place(i), *yi = ADD ? y + place(i) : nullptr;
    Element* ri = ADD ? dr + i * pixels * C : nullptr;
    sums<K>(pixels, C, &found[i * K * C], [&](int64_t c, auto m) {
      return [=, mu = load(mean + c, m), k = load(&scale[c], m), h = load(&shift[c], m)](int64_t j, Floats* s) {
        const Floats v = load(xi + j, m), d = v - mu;
        Floats dy = load(gi + j, m);
        dy = Act::gradient(ADD ? load(yi + j, m) : k * v + h, dy);
        if (ADD) store(ri + j, dy, m);
        s[0] += dy, s[1] += dy * d;
        if (WEIGHTED) s[2] += d, s[3] += d * d;
      };
    });
  });

  for (int64_t c = 0; c < C; ++c) {
    const double is = invstd[c], count = double(n) * pixels;
    double S0 = 0, S1 = 0, S2 = 0, T0 = 0, T1 = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float* of = &found[i * K * C + c];
      T0 += of[0], T1 += of[C] * is;
      if (WEIGHTED)
        S0 += weight[i] * double(pixels), S1 += weight[i] * of[2 * C] * is, S2 += weight[i] * of[3 * C] * is * is;
    }
    if (WEIGHTED) {
      S2 += S0 * eps * is * is;
      const double det = S0 * S2 - S1 * S1;
      a[c] = (S2 * T0 - S1 * T1) / det, b[c] = (S0 * T1 - S1 * T0) / det;
    } else {
      a[c] = T0 / count, b[c] = T1 / count;
    }
    dbeta[c] = T0, dgamma[c] = T1;
  }

  each(n, n * pixels * C, threads, [&](int64_t i) {
    const Element *gi = (ADD ? dr : g) + i * pixels * C, *xi = x + place(i);
    Element* to = dx + i * pixels * C;
    const float w = WEIGHTED ? weight[i] : 1;
    blocks(C, [&](int64_t c, auto m) {
      const Floats k = load(&scale[c], m), h = load(&shift[c], m), all = k * w;
      const Floats slope = load(&b[c], m) * load(invstd + c, m) * all;
      const Floats constant = load(&a[c], m) * all - slope * load(mean + c, m);
      for (int64_t j = c; j < pixels * C; j += C) {
        const Floats v = load(xi + j, m);
        Floats dy = load(gi + j, m);
        if (!ADD) dy = Act::gradient(k * v + h, dy);
        store(to + j, k * dy - constant - slope * v, m);
      }
    });
  });
}

// f with what follows as a type; with an added r that is a ReLU, whose outputs tell where it let through
template <class F>
void choose(int64_t act, bool add, F f) {
  if (add) return f(std::true_type(), ReLU());
  if (act == 0) return f(std::false_type(), Nothing());
  if (act == 1) return f(std::false_type(), ReLU());
  if (act == 2) return f(std::false_type(), GELU());
  if (act == 3) return f(std::false_type(), SiLU());
}

}  // namespace

extern "C" {

#define DEFINE(NAME, ELEMENT)                                                                                        \
  void NAME##_forward(int64_t act, const ELEMENT* x, const ELEMENT* r, ELEMENT* y, const float* gamma,                   \
                      const float* beta, float eps, float* mean, float* var, float* invstd, int64_t n,               \
                      int64_t pixels, int64_t C, int64_t threads) {                                                  \
    choose(act, r, [&](auto add, auto what) {                                                                        \
      forward<decltype(add)::value, decltype(what)>(x, r, y, gamma, beta, eps, mean, var, invstd, n, pixels, C,      \
                                                    threads);                                                        \
    });                                                                                                              \
  }                                                                                                                  \
  void NAME##_backward(int64_t act, const ELEMENT* g, const ELEMENT* x, const ELEMENT* y, const int64_t* index,          \
                       const float* weight, const float* gamma, const float* beta, const float* mean,                \
                       const float* invstd, float eps, ELEMENT* dx, ELEMENT* dr, float* dgamma, float* dbeta,        \
                       int64_t n, int64_t pixels, int64_t C, int64_t threads) {                                      \
    choose(act, y, [&](auto add, auto what) {                                                                        \
      auto run = weight ? backward<decltype(add)::value, decltype(what), true, ELEMENT>                              \
                        : backward<decltype(add)::value, decltype(what), false, ELEMENT>;                            \
      run(g, x, y, index, weight, gamma, beta, mean, invstd, eps, dx, dr, dgamma, dbeta, n, pixels, C, threads);     \
    });                                                                                                              \
  }

DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
}
