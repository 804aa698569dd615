// The loops over elements. This file is compiled once per instruction set, with
// LARSKIT_LOOPS naming the result; -ffp-contract=off keeps a*b + c two operations. It
// calls no inline function of the standard library: the linker keeps one copy of it, which
// may use instructions that the processor does not have.
#include "kernel.hpp"

#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Results may be written over what is read. Compilers then vectorize only if they are told
// that no iteration reads what another one writes.
#if defined(__clang__)
#define LARSKIT_IN_PLACE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define LARSKIT_IN_PLACE _Pragma("GCC ivdep")
#else
#define LARSKIT_IN_PLACE
#endif

#if defined(__GNUC__)
#define LARSKIT_PREFETCH(address) __builtin_prefetch(address)
#else
#define LARSKIT_PREFETCH(address) (void)(address)
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

// To the nearest, ties to even, as torch rounds; any NaN becomes torch's own NaN.
inline void round_to(float x, bfloat16 &out) {
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

inline void round_to(float x, float16 &out) {
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
      round_to(x[i], out[i]);
}

// Write up to a block past the caches: an array that is larger than they are would first be
// read into them, and has left them when it is used. Every write must be fenced.
template <class T> void store_past_caches(const T *x, std::int64_t n, T *out) {
  std::int64_t i = 0;
#if defined(__AVX2__)
  constexpr std::int64_t step = 32 / sizeof(T);
  if (reinterpret_cast<std::uintptr_t>(out) % 32 == 0)
    for (; i + step <= n; i += step)
      _mm256_stream_si256(reinterpret_cast<__m256i *>(out + i),
                          _mm256_load_si256(reinterpret_cast<const __m256i *>(x + i)));
#endif
  for (; i < n; ++i)
    out[i] = x[i];
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// As many float64 numbers as a register of AVX2 holds, to which float32 widens faster
// than to one of AVX-512. The square of a float32 is exact in float64, so that adding it
// in one fused operation rounds as two operations do. The square of a float64 is not.
#if defined(__AVX2__) && defined(__FMA__) && defined(__GNUC__)
typedef __m256d Float64s;
inline Float64s float64s(const float *x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
inline Float64s float64s(const double *x) { return _mm256_loadu_pd(x); }
inline Float64s add_square(Float64s x, Float64s sum, float) { return _mm256_fmadd_pd(x, x, sum); }
#elif defined(__GNUC__)
typedef double Float64s __attribute__((vector_size(16)));
template <class C> Float64s float64s(const C *x) { return Float64s{double(x[0]), double(x[1])}; }
inline Float64s add_square(Float64s x, Float64s sum, float) { return sum + x * x; }
#else
typedef double Float64s;
template <class C> Float64s float64s(const C *x) { return double(*x); }
inline Float64s add_square(Float64s x, Float64s sum, float) { return sum + x * x; }
#endif
inline Float64s add_square(Float64s x, Float64s sum, double) { return sum + x * x; }

// norm.sum_of_squares of one block: rows in turn, then the lanes folded in halves. As
// many lanes go down the rows together as there are registers for their sums. A block of
// float32 fills a page of memory, at whose end the processor stops reading ahead: to ask
// for the next block takes a sixth off the time of measuring. Its address may be any.
template <class C> double sum_of_squares(const C *x, std::int64_t n) {
  constexpr int width = sizeof(Float64s) / sizeof(double);
  constexpr int together = 8 * width < lanes ? 8 : lanes / width;
  const std::int64_t whole = n / lanes * lanes;
  alignas(64) C last[lanes] = {};
  for (std::int64_t i = whole; i < n; ++i)
    last[i - whole] = x[i];
  alignas(64) double total[lanes];
  for (int lane = 0; lane < lanes; lane += together * width) {
    Float64s sums[together] = {};
    for (std::int64_t i = lane; i < whole; i += lanes) {
      for (int j = 0; j < together * width; j += 64 / sizeof(C))
        LARSKIT_PREFETCH(x + i + j + block);
      for (int j = 0; j < together; ++j)
        sums[j] = add_square(float64s(x + i + j * width), sums[j], C());
    }
    for (int j = 0; j < together; ++j)
        sums[j] = add_square(float64s(last + lane + j * width), sums[j], C());
    std::memcpy(total + lane, sums, sizeof sums);
  }
  for (int half = lanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane)
      total[lane] += total[lane + half];
  return total[0];
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

// rule._accumulate: returns the new buffer, and sets `y` to what to step along.
template <class C>
const C *accumulate(const Options &o, const C *v, const C *x, std::int64_t n, C *new_v,
                    C *ahead, const C *&y) {
  const C mu = C(o.momentum), taken = C(1 - o.dampening);
  if (v)
    for (std::int64_t i = 0; i < n; ++i)
      new_v[i] = mu * v[i] + taken * x[i];
  const C *kept = y = v ? new_v : x;
  if (o.nesterov) {
    for (std::int64_t i = 0; i < n; ++i)
      ahead[i] = x[i] + mu * kept[i];
    y = ahead;
  }
  return kept;
}

// rule._accumulate_plain: what is not there yet counts as zeros.
template <class C>
const C *accumulate_plain(const Options &o, const C *v, const C *u, std::int64_t n,
                          C *new_v, C *ahead, const C *&y) {
  static const C zeros[block] = {};
  return accumulate(o, v ? v : zeros, u, n, new_v, ahead, y);
}

std::int64_t elements(const Layer &layer, std::int64_t k) {
  const std::int64_t left = layer.size - k * block;
  return left < block ? left : block;
}

// W and G are the dtypes of the weights and the gradients, C that of the arithmetic.
template <class W, class G, class C> struct Typed {
  static void weights(const Options &, const Layer &layer, std::int64_t first,
                      std::int64_t last, double *sums) {
    square(layer.weights, layer, first, last, sums);
  }

  // rule.measured_gradient.
  static void gradient(const Options &o, const Layer &layer, std::int64_t first,
                       std::int64_t last, double *sums) {
    alignas(64) C a[block], b[block], c[block], d[block], e[block];
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      const C *x = read<G>(layer.gradient, k, n, a);
      if (o.denominator == Denominator::decayed_gradient ||
          o.denominator == Denominator::momentum)
        x = decayed(o, read<W>(layer.weights, k, n, b), x, n, c);
      if (o.denominator == Denominator::momentum)
        accumulate_plain(o, read<W>(layer.buffer, k, n, b), x, n, d, e, x);
      sums[k] = sum_of_squares(x, n);
    }
  }

  // rule.step.
  static void step(const Options &o, const Layer &layer, double ratio,
                   std::int64_t first, std::int64_t last, double *update_sums,
                   double *result_sums) {
    alignas(64) C a[block], b[block], c[block], d[block], e[block], f[block];
    const C r = C(ratio), lr = C(o.lr), lr_r = lr * r;
    const bool inside = o.lr_placement == LrPlacement::inside;
    const bool plain = o.denominator == Denominator::momentum;
    const bool simple =
        layer.buffer && layer.new_buffer && !o.nesterov && !o.maximize && !plain;
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      const C *w = read<W>(layer.weights, k, n, a);
      const C *g = read<G>(layer.gradient, k, n, b);
      const C *v = read<W>(layer.buffer, k, n, d), *y;
      W *result = static_cast<W *>(layer.result) + k * block;
      W *buffer = layer.new_buffer ? static_cast<W *>(layer.new_buffer) + k * block
                                   : nullptr;
      if (simple && !update_sums) {
        C *new_w = place(result, a), *new_v = place(buffer, e);
        common(o, w, g, v, r, n, new_w, new_v);
        keep(new_w, n, result);
        keep(new_v, n, buffer);
        if (result_sums) // of what was rounded, while it is in the nearest cache
          result_sums[k] = sum_of_squares(load(result, n, a), n);
        continue;
      }
      const C *new_v, *u = decayed(o, w, g, n, c);
      if (plain)
        new_v = accumulate_plain(o, v, u, n, e, f, y);
      else {
        const C factor = inside ? lr_r : r;
        for (std::int64_t i = 0; i < n; ++i)
          c[i] = factor * u[i];
        new_v = accumulate(o, v, c, n, e, f, y);
      }
      if (buffer)
        store(new_v, n, buffer);
      const C factor = inside ? C(1) : plain ? lr_r : lr;
      LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) {
        C moved = factor * y[i];
        c[i] = moved;
        a[i] = w[i] - moved;
      }
      if (update_sums)
        update_sums[k] = sum_of_squares(c, n);
      store(a, n, result);
      if (result_sums)
        result_sums[k] = sum_of_squares(load(result, n, a), n);
    }
  }

  // rule.scaled_gradient.
  static void scale(const Options &o, const Layer &layer, double ratio,
                    std::int64_t first, std::int64_t last, double *, double *) {
    alignas(64) C c[block];
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      G *result = static_cast<G *>(layer.result) + k * block;
      scale_block(o, layer, ratio, k, n, c, result);
    }
  }

  static void scale_past_caches(const Options &o, const Layer &layer, double ratio,
                                std::int64_t first, std::int64_t last, double *, double *) {
    alignas(64) C c[block];
    alignas(64) G result[block];
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      scale_block(o, layer, ratio, k, n, c, result);
      store_past_caches(result, n, static_cast<G *>(layer.result) + k * block);
    }
    fence();
  }

private:
  // What most steps are, in one loop: momentum from a buffer, and no Nesterov.
  static void common(const Options &o, const C *w, const C *g, const C *v, C r,
                     std::int64_t n, C *new_w, C *new_v) {
    const C mu = C(o.momentum), taken = C(1 - o.dampening), wd = C(o.weight_decay);
    const bool decays = o.weight_decay != 0; // `wd` may have underflowed: 0*inf is NaN
    const bool inside = o.lr_placement == LrPlacement::inside;
    const C lr = C(o.lr), in = inside ? lr * r : r, out = inside ? C(1) : lr;
    if (!decays && taken == 1 && inside)
      LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) {
        C moved = mu * v[i] + in * g[i];
        new_v[i] = moved;
        new_w[i] = w[i] - moved;
      }
    else if (taken == 1 && inside)
      LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) {
        C moved = mu * v[i] + in * (g[i] + wd * w[i]);
        new_v[i] = moved;
        new_w[i] = w[i] - moved;
      }
    else
      LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) {
        C u = decays ? g[i] + wd * w[i] : g[i];
        C moved = mu * v[i] + taken * (in * u);
        new_v[i] = moved;
        new_w[i] = w[i] - out * moved;
      }
  }

  static void scale_block(const Options &o, const Layer &layer, double ratio,
                          std::int64_t k, std::int64_t n, C *c, G *result) {
    alignas(64) C a[block], b[block];
    const C r = C(ratio), *w = read<W>(layer.weights, k, n, a);
    const C *u = decayed(o, w, read<G>(layer.gradient, k, n, b), n, c);
    C *out = place(result, c);
    LARSKIT_IN_PLACE for (std::int64_t i = 0; i < n; ++i) out[i] = r * u[i];
    keep(out, n, result);
  }

  // Where the arithmetic writes its results: into an array of its own dtype at once, else
  // into `space`, from where `keep` rounds them into the array.
  template <class T> static C *place(T *x, C *space) {
    if constexpr (std::is_same_v<T, C>)
      return x;
    else
      return space;
  }
  template <class T> static void keep(const C *x, std::int64_t n, T *out) {
    if constexpr (!std::is_same_v<T, C>)
      store(x, n, out);
  }

  // Block k of an array, as `load` does; null where there is none.
  template <class T>
  static const C *read(const void *x, std::int64_t k, std::int64_t n, C *space) {
    return x ? load(static_cast<const T *>(x) + k * block, n, space) : nullptr;
  }

  static void square(const void *x, const Layer &layer, std::int64_t first,
                     std::int64_t last, double *sums) {
    alignas(64) C space[block];
    for (std::int64_t k = first; k < last; ++k) {
      std::int64_t n = elements(layer, k);
      sums[k] = sum_of_squares(read<W>(x, k, n, space), n);
    }
  }
};

#define LARSKIT_TEXT_(x) #x
#define LARSKIT_TEXT(x) LARSKIT_TEXT_(x)
#define LARSKIT_JOIN_(a, b) a##b
#define LARSKIT_JOIN(a, b) LARSKIT_JOIN_(a, b)

template <class T>
constexpr Loops table = {LARSKIT_TEXT(LARSKIT_LOOPS),
                         T::weights,
                         T::gradient,
                         T::step,
                         T::scale,
                         T::scale_past_caches};

} // namespace

const Loops &LARSKIT_JOIN(loops_, LARSKIT_LOOPS)(Dtype weights, Dtype gradients) {
  if (weights == Dtype::float64)
    return table<Typed<double, double, double>>;
  if (weights == Dtype::bfloat16)
    return table<Typed<bfloat16, bfloat16, float>>;
  if (weights == Dtype::float16)
    return table<Typed<float16, float16, float>>;
  if (gradients == Dtype::bfloat16)
    return table<Typed<float, bfloat16, float>>;
  if (gradients == Dtype::float16)
    return table<Typed<float, float16, float>>;
  return table<Typed<float, float, float>>;
}

} // namespace larskit
