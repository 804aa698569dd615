// The loops over elements. This file is compiled once per instruction set, with
// LARSKIT_LOOPS naming the result; -ffp-contract=off keeps a*b + c two operations. It
// calls no inline function of the library: the linker keeps one copy of such a one, which
// may be of an instruction set that the processor has not.
#include "kernel.hpp"

#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// What an iteration reads, no other one writes, though arrays may be the same.
#if defined(__clang__)
#define LARSKIT_IN_PLACE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define LARSKIT_IN_PLACE _Pragma("GCC ivdep")
#else
#define LARSKIT_IN_PLACE
#endif

namespace larskit {
namespace {

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

inline float widen(bfloat16 x) {
  std::uint32_t bits = std::uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void narrow(float x, bfloat16 &out) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = std::uint16_t(x != x ? 0x7fc0 : rounded);
}

inline float widen(float16 x) {
  std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  std::uint32_t rest = x.bits & 0x7fff, bits;
  float out;
  if (rest >= 0x7c00) // infinite or NaN
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  else if (rest >= 0x400)
    bits = sign | ((rest << 13) + 0x38000000);
  else { // subnormal: rest * 2^-24 is exact
    out = float(rest) * 0x1p-24f;
    std::memcpy(&bits, &out, 4);
    bits |= sign;
  }
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void narrow(float x, float16 &out) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  std::uint32_t sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000)
    out.bits = std::uint16_t(sign | 0x7e00);
  else if (rest >= 0x477ff000) // rounds to 65536 or more
    out.bits = std::uint16_t(sign | 0x7c00);
  else if (rest < 0x38800000) { // subnormal: adding 0.5 rounds at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    std::memcpy(&rest, &magnitude, 4);
    out.bits = std::uint16_t(sign | (rest - 0x3f000000));
  } else
    out.bits = std::uint16_t(
        sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
}

// Return up to a block of elements in the dtype that the arithmetic runs in: the array
// itself where it has it, else a copy in `space`.
template <class T, class C> const C *load(const T *x, std::int64_t n, C *space) {
  if constexpr (std::is_same_v<T, C>)
    return x;
  else {
    std::int64_t i = 0;
#if defined(__F16C__)
    if constexpr (std::is_same_v<T, float16>)
      for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(space + i, _mm256_cvtph_ps(_mm_loadu_si128(
                                        reinterpret_cast<const __m128i *>(x + i))));
#endif
    for (; i < n; ++i)
      space[i] = widen(x[i]);
    return space;
  }
}

template <class T, class C> void store(const C *x, std::int64_t n, T *out) {
  std::int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float16>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(x + i),
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i)
    if constexpr (std::is_same_v<T, C>)
      out[i] = x[i];
    else
      narrow(x[i], out[i]);
}

// Eight numbers that stay in registers; a compiler without vectors keeps an array.
#if defined(__GNUC__)
typedef double Eight __attribute__((vector_size(64)));
template <class C> Eight eight(const C *x) {
  typedef C Narrow __attribute__((vector_size(8 * sizeof(C))));
  Narrow loaded;
  std::memcpy(&loaded, x, sizeof loaded);
  return __builtin_convertvector(loaded, Eight);
}
#else
struct Eight {
  double x[8];
  double &operator[](int i) { return x[i]; }
  Eight &operator+=(const Eight &o) {
    for (int i = 0; i < 8; ++i)
      x[i] += o.x[i];
    return *this;
  }
  friend Eight operator*(const Eight &a, const Eight &b) {
    Eight out;
    for (int i = 0; i < 8; ++i)
      out.x[i] = a.x[i] * b.x[i];
    return out;
  }
};
template <class C> Eight eight(const C *x) {
  Eight out;
  for (int i = 0; i < 8; ++i)
    out.x[i] = x[i];
  return out;
}
#endif

// rule.sum_of_squares of one block: rows in turn, then the lanes folded in halves.
template <class C> double sum_of_squares(const C *x, std::int64_t n) {
  Eight total[lanes / 8] = {};
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int j = 0; j < lanes / 8; ++j) {
      Eight wide = eight(x + i + 8 * j);
      total[j] += wide * wide;
    }
  for (std::int64_t lane = 0; i + lane < n; ++lane) {
    double wide = x[i + lane];
    total[lane / 8][lane % 8] += wide * wide;
  }
  total[0] += total[2];
  total[1] += total[3];
  total[0] += total[1];
  for (int half = 4; half; half /= 2)
    for (int lane = 0; lane < half; ++lane)
      total[0][lane] += total[0][lane + half];
  return total[0][0];
}

// rule.decayed.
template <class C>
const C *decayed(const Options &o, const C *w, const C *g, std::int64_t n, C *u) {
  const C wd = C(o.weight_decay);
  if (o.weight_decay == 0 && !o.maximize)
    return g;
  if (o.weight_decay == 0)
    for (std::int64_t i = 0; i < n; ++i)
      u[i] = -g[i];
  else if (o.maximize)
    for (std::int64_t i = 0; i < n; ++i)
      u[i] = -g[i] + wd * w[i];
  else
    for (std::int64_t i = 0; i < n; ++i)
      u[i] = g[i] + wd * w[i];
  return u;
}

// rule._accumulate: the new buffer goes to `new_v`, what to step along is returned.
template <class C>
const C *accumulate(const Options &o, const C *v, const C *x, std::int64_t n, C *new_v,
                    C *y) {
  const C mu = C(o.momentum), taken = C(1 - o.dampening);
  if (!o.has_momentum)
    return x;
  if (v)
    for (std::int64_t i = 0; i < n; ++i)
      new_v[i] = mu * v[i] + taken * x[i];
  else
    for (std::int64_t i = 0; i < n; ++i)
      new_v[i] = x[i];
  if (!o.nesterov)
    return new_v;
  for (std::int64_t i = 0; i < n; ++i)
    y[i] = x[i] + mu * new_v[i];
  return y;
}

// rule._accumulate_plain: what is not there yet counts as zeros.
template <class C>
const C *accumulate_plain(const Options &o, const C *v, const C *u, std::int64_t n,
                          C *new_v, C *y) {
  static const C zeros[block] = {};
  return accumulate(o, v ? v : zeros, u, n, new_v, y);
}

std::int64_t elements(const Layer &layer, std::int64_t k) {
  const std::int64_t left = layer.size - k * block;
  return left < block ? left : block;
}

template <class W, class G, class C> struct Typed {
  static void square_weights(const Options &, const Layer &layer, std::int64_t first,
                             std::int64_t last, double *sums) {
    alignas(64) C space[block];
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      auto *w = static_cast<const W *>(layer.weights) + k * block;
      sums[k] = sum_of_squares(load(w, n, space), n);
    }
  }

  // rule.measured.
  static void square_measured(const Options &o, const Layer &layer, std::int64_t first,
                              std::int64_t last, double *sums) {
    alignas(64) C a[block], b[block], c[block], d[block], e[block];
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      const C *x = load(static_cast<const G *>(layer.gradient) + k * block, n, a);
      if (o.denominator == Denominator::decayed_gradient ||
          o.denominator == Denominator::momentum) {
        x = decayed(o, load(static_cast<const W *>(layer.weights) + k * block, n, b), x,
                    n, c);
        if (o.denominator == Denominator::momentum)
          x = accumulate_plain(o, buffer(layer, k, n, b), x, n, d, e);
      }
      sums[k] = sum_of_squares(x, n);
    }
  }

  // rule.step.
  static void update(const Options &o, const Layer &layer, double ratio,
                     std::int64_t first, std::int64_t last) {
    alignas(64) C a[block], b[block], c[block], d[block], e[block], f[block];
    const C r = C(ratio), lr = C(o.lr), lr_r = lr * r;
    const bool plain = o.denominator == Denominator::momentum;
    const bool simple = o.has_momentum && !o.nesterov && !o.maximize && !plain;
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      W *weights = static_cast<W *>(layer.weights) + k * block;
      const C *w = load(weights, n, a);
      const C *g = load(static_cast<const G *>(layer.gradient) + k * block, n, b);
      const C *v = buffer(layer, k, n, d), *y;
      if (simple && v) {
        W *buffers = static_cast<W *>(layer.buffer) + k * block;
        C *new_w = place(weights, a), *new_v = place(buffers, e);
        common(o, w, g, v, r, n, new_w, new_v);
        keep(new_w, n, weights);
        keep(new_v, n, buffers);
        continue;
      }
      const C *u = decayed(o, w, g, n, c);
      if (plain)
        y = accumulate_plain(o, v, u, n, e, f);
      else {
        const C factor = o.inside ? lr_r : r;
        for (std::int64_t i = 0; i < n; ++i)
          c[i] = factor * u[i];
        y = accumulate(o, v, c, n, e, f);
      }
      if (o.has_momentum)
        store(e, n, static_cast<W *>(layer.buffer) + k * block);
      const C factor = o.inside ? C(1) : plain ? lr_r : lr;
      for (std::int64_t i = 0; i < n; ++i)
        a[i] = w[i] - factor * y[i];
      store(a, n, weights);
    }
  }

private:
  // What most steps are, in one loop: momentum from a buffer, and no Nesterov.
  static void common(const Options &o, const C *w, const C *g, const C *v, C r,
                     std::int64_t n, C *new_w, C *new_v) {
    const C mu = C(o.momentum), taken = C(1 - o.dampening), wd = C(o.weight_decay);
    const C lr = C(o.lr), in = o.inside ? lr * r : r, out = o.inside ? C(1) : lr;
    if (wd == 0 && taken == 1 && o.inside)
      LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) {
        C moved = mu * v[i] + in * g[i];
        new_v[i] = moved;
        new_w[i] = w[i] - moved;
      }
    else if (taken == 1 && o.inside)
      LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) {
        C moved = mu * v[i] + in * (g[i] + wd * w[i]);
        new_v[i] = moved;
        new_w[i] = w[i] - moved;
      }
    else
      LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) {
        C u = wd == 0 ? g[i] : g[i] + wd * w[i];
        C moved = mu * v[i] + taken * (in * u);
        new_v[i] = moved;
        new_w[i] = w[i] - out * moved;
      }
  }

  // Where results of the arithmetic go: into the array itself, or first into `space`.
  static C *place(W *x, C *space) {
    if constexpr (std::is_same_v<W, C>)
      return x;
    else
      return space;
  }
  static void keep(const C *x, std::int64_t n, W *out) {
    if constexpr (!std::is_same_v<W, C>)
      store(x, n, out);
  }

  static const C *buffer(const Layer &layer, std::int64_t k, std::int64_t n, C *space) {
    if (!layer.buffer || layer.first)
      return nullptr;
    return load(static_cast<const W *>(layer.buffer) + k * block, n, space);
  }
};

// Call `f` with the loops for the dtypes in `o`.
template <class F> void typed(const Options &o, F f) {
  if (o.weights == Dtype::float64)
    f(Typed<double, double, double>{});
  else if (o.weights == Dtype::bfloat16)
    f(Typed<bfloat16, bfloat16, float>{});
  else if (o.weights == Dtype::float16)
    f(Typed<float16, float16, float>{});
  else if (o.gradients == Dtype::bfloat16)
    f(Typed<float, bfloat16, float>{});
  else if (o.gradients == Dtype::float16)
    f(Typed<float, float16, float>{});
  else
    f(Typed<float, float, float>{});
}

void square_weights(const Options &o, const Layer &layer, std::int64_t first,
                    std::int64_t last, double *sums) {
  typed(o, [&](auto t) { t.square_weights(o, layer, first, last, sums); });
}

void square_measured(const Options &o, const Layer &layer, std::int64_t first,
                     std::int64_t last, double *sums) {
  typed(o, [&](auto t) { t.square_measured(o, layer, first, last, sums); });
}

void update(const Options &o, const Layer &layer, double ratio, std::int64_t first,
            std::int64_t last) {
  typed(o, [&](auto t) { t.update(o, layer, ratio, first, last); });
}

} // namespace

#define LARSKIT_TEXT_(x) #x
#define LARSKIT_TEXT(x) LARSKIT_TEXT_(x)
#define LARSKIT_JOIN_(a, b) a##b
#define LARSKIT_JOIN(a, b) LARSKIT_JOIN_(a, b)

extern const Loops LARSKIT_JOIN(loops_, LARSKIT_LOOPS) = {
    LARSKIT_TEXT(LARSKIT_LOOPS), square_weights, square_measured, update};

} // namespace larskit
