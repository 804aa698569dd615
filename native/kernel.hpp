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
  bool inside, nesterov, clip, adapt, maximize, zero_guard;
  bool measure_result; // also measure the weights that the step leaves
  double lr, momentum, weight_decay, trust_coefficient, eps, dampening, threshold;
};

// One layer: arrays of `size` elements that lie in one order. What is written may be the
// very array that is read. `buffer` is null before the first step, and `new_buffer` where
// none is kept.
struct Layer {
  const void *weights, *gradient, *buffer;
  void *result, *new_buffer;
  std::int64_t size;
};

// What a group must hold, in elements, to be worth the waking of a second thread.
constexpr std::int64_t alone = 512 * 1024;

// What is known of a layer, and after a step all of it; negative while unknown.
struct Lengths {
  double weight, denominator, ratio, result;
};

// Block k of an array is its elements [k * block, (k + 1) * block).
constexpr std::int64_t rows = 32, lanes = 32, block = rows * lanes;

// The loops over the elements of the blocks [first, last), compiled once per instruction
// set.
struct Loops {
  using Sum = void (*)(const Options &, const Layer &, std::int64_t first,
                       std::int64_t last, double *sums);
  using Move = void (*)(const Options &, const Layer &, double ratio,
                        std::int64_t first, std::int64_t last);
  const char *name;
  Sum square_weights, square_measured, square_result;
  Move update, rescale;
};

const Loops &loops_baseline(Dtype weights, Dtype gradients);
#if defined(LARSKIT_X86)
const Loops &loops_avx2(Dtype weights, Dtype gradients);
const Loops &loops_avx512(Dtype weights, Dtype gradients);
#endif

// The best loops that this processor runs.
const Loops &loops(Dtype weights, Dtype gradients);

// Move every layer: `result` becomes the new weights.
void step(const Options &, const std::vector<Layer> &, Lengths *, int threads);

// Measure every layer, and move none.
void measure(const Options &, const std::vector<Layer> &, Lengths *, int threads);

// Rescale every gradient: `result`, in the dtype of the gradient, becomes r*u.
void rescale(const Options &, const std::vector<Layer> &, Lengths *, int threads);

} // namespace larskit
