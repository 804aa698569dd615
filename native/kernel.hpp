// LARS over the layers of a group, in plain C++: the operations of larskit/rule.py in the
// same order, so that the results are bitwise identical. No Python, no framework.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace larskit {

enum class Dtype { float32, float64, bfloat16, float16 };
enum class Denominator { paper, decayed_gradient, gradient, momentum };
enum class LrPlacement { inside, outside };

// The fields of larskit.config.Config, but for `adapt` and `decay`: layers have their own.
#define LARSKIT_FIELDS(FIELD)                                                          \
  FIELD(double, momentum)                                                              \
  FIELD(double, weight_decay)                                                          \
  FIELD(double, trust_coefficient)                                                     \
  FIELD(double, eps)                                                                   \
  FIELD(Denominator, denominator)                                                      \
  FIELD(LrPlacement, lr_placement)                                                     \
  FIELD(bool, nesterov)                                                                \
  FIELD(double, dampening)                                                             \
  FIELD(bool, clip)                                                                    \
  FIELD(double, threshold)                                                             \
  FIELD(bool, maximize)                                                                \
  FIELD(bool, zero_guard)

struct Options {
#define LARSKIT_DECLARE(type, name) type name;
  LARSKIT_FIELDS(LARSKIT_DECLARE)
#undef LARSKIT_DECLARE
  double lr;
};

// One layer: arrays of `size` elements in one memory order. What is written may be the
// very array that is read. `buffer` is null before the first step, and `new_buffer` where
// none is kept. A layer that `carries` has the norm of its result computed too.
struct Layer {
  const void *weights, *gradient, *buffer;
  void *result, *new_buffer;
  std::int64_t size;
  bool adapt, decay, carries;
};

// The statistics of a layer. A norm that is negative is not known yet: a caller that knows
// it fills it in, which saves reading the array.
struct Stats {
  double weight_norm, gradient_norm, trust_ratio;
  double update_norm; // of what the step subtracts from the weights, if asked for
  double result_norm; // of the new weights, where the layer carries it
};

// In elements: a smaller group takes less time than waking a second thread. Torch's threads
// are still awake after its own operations.
constexpr std::int64_t serial_below = 512 * 1024, serial_below_with_torch = 128 * 1024;

// In elements: the largest layer that one thread takes whole. Its weights and gradient are
// then still in that thread's cache when it writes the results.
constexpr std::int64_t undivided = 256 * 1024;

// Block k of an array is its elements [k * block, (k + 1) * block).
constexpr std::int64_t rows = 32, lanes = 32, block = rows * lanes;

// The loops over the elements of the blocks [first, last), compiled once per instruction
// set. Each block's sum of squares goes to sums[k]; `step` gives those of the update and of
// the result, and leaves out what is null.
struct Loops {
  using Measure = void (*)(const Options &, const Layer &, std::int64_t first,
                           std::int64_t last, double *sums);
  using Write = void (*)(const Options &, const Layer &, double ratio,
                         std::int64_t first, std::int64_t last, double *update_sums,
                         double *result_sums);
  const char *name;
  Measure weights, gradient;
  Write step, scale, scale_past_caches;
};

const Loops &loops_baseline(Dtype weights, Dtype gradients);
#if defined(LARSKIT_X86)
const Loops &loops_avx2(Dtype weights, Dtype gradients);
const Loops &loops_avx512(Dtype weights, Dtype gradients);
#endif

// The best loops that this processor runs.
const Loops &loops(Dtype weights, Dtype gradients);

// Layers, and how the work on them is divided among threads. The division and the memory
// for the sums are kept from call to call: for many small layers, making them takes as
// long as the step itself. One call at a time.
class Batch {
public:
  // `with_torch`: see `parallel`.
  Batch(Dtype weights, Dtype gradients, std::vector<Layer> layers, bool with_torch);

  // The arrays may be replaced between calls, the sizes not.
  std::vector<Layer> layers;

  // Fill in the statistics, and write nothing.
  void measure(const Options &, Stats *, int threads);

  // Write the new weights and buffers.
  void step(const Options &, Stats *, int threads, bool update_norms);

  // Write r*u, in the dtype of the gradients.
  void scale(const Options &, Stats *, int threads);

private:
  struct Call;
  struct Piece { // blocks [first, last) of a layer
    int layer;
    std::int64_t first, last;
    bool whole;
  };
  struct Claim { // of a piece: which thread measures it, and whether one writes it
    std::atomic<int> measurer;
    std::atomic<bool> written;
  };
  struct Progress {
    std::atomic<std::int64_t> unmeasured, unwritten; // blocks
    std::atomic<bool> measured;
  };
  enum Sums { of_weights, of_gradient, of_update, of_result };

  void run(const Call &, int threads);
  void plan(int threads);
  void share_whole(const std::vector<int> &order, int threads);
  void work(const Call &, int thread);
  void measure_section(const Call &, int thread, const int *shares);
  void write_section(const Call &, int thread, int begin, int end);
  void measure(const Call &, const Piece &);
  void write(const Call &, const Piece &);
  void write_backwards(const Call &, const Piece &);
  double *sums(int layer, Sums of);
  double norm(int layer, Sums of);

  const Loops &loops_;
  const bool with_torch_;
  std::vector<std::int64_t> starts_; // where the sums of each layer begin, and the end
  std::vector<double> sums_;
  std::unique_ptr<Progress[]> progress_;
  std::vector<Piece> pieces_;
  std::unique_ptr<Claim[]> claims_;
  // For each section of the pieces, where the share of each thread begins, and the end.
  std::vector<int> shares_;
  int threads_ = 0; // that the pieces are divided among
  bool carries_ = false;
  std::int64_t size_ = 0;
};

} // namespace larskit
