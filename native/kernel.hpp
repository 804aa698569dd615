// One LARS step over the layers of a group, in plain C++: what larskit/rule.py says,
// operation by operation, to the bit. No Python, no framework.
#pragma once

#include <cstdint>
#include <vector>

namespace larskit {

enum class Dtype { float32, float64, bfloat16, float16 };
enum class Denominator { paper, decayed_gradient, gradient, momentum };

// The hyper-parameters of a group, named as in larskit/config.py.
struct Options {
  Dtype weights, gradients;
  Denominator denominator;
  bool inside, nesterov, clip, adapt, maximize, zero_guard, has_momentum;
  double lr, momentum, weight_decay, trust_coefficient, eps, dampening, threshold;
};

// One layer: contiguous arrays of `size` elements; `buffer` may be null, and is
// written without being read where `first` is true.
struct Layer {
  void *weights;
  const void *gradient;
  void *buffer;
  std::int64_t size;
  bool first;
};

struct Lengths {
  double weight, denominator, ratio;
};

// Block k of an array is its elements [k * block, (k + 1) * block).
constexpr std::int64_t rows = 32, lanes = 32, block = rows * lanes;

// The loops over elements, compiled once per instruction set.
struct Loops {
  const char *name;
  void (*square_weights)(const Options &, const Layer &, std::int64_t, std::int64_t,
                         double *);
  void (*square_measured)(const Options &, const Layer &, std::int64_t, std::int64_t,
                          double *);
  void (*update)(const Options &, const Layer &, double, std::int64_t, std::int64_t);
};

extern const Loops loops_baseline;
#if defined(LARSKIT_X86)
extern const Loops loops_avx2, loops_avx512;
#endif

// The best loops that this processor runs.
const Loops &loops();

// Move every layer. `known` holds lengths that were found already, or is empty.
std::vector<Lengths> step(const Options &, const std::vector<Layer> &, int threads,
                          const std::vector<Lengths> &known);

} // namespace larskit
