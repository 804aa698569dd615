#include "kernel.hpp"

#include "pool.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>

namespace larskit {
namespace {

// In elements: what a layer may hold to be left to one thread, which then finds it in its
// own cache.
constexpr std::int64_t whole = 256 * 1024;

// In blocks: what threads take of a larger layer, and what is moved before it has left the
// cache, where its result is measured.
constexpr std::int64_t piece = 64;

std::int64_t blocks(const Layer &layer) {
  return std::max<std::int64_t>(1, (layer.size + block - 1) / block);
}

// rule._fold: the upper half onto the lower one, until one number is left.
double fold(std::vector<double> &sums) {
  for (std::size_t size = sums.size(); size > 1;) {
    std::size_t half = (size + 1) / 2;
    for (std::size_t i = 0; i < size - half; ++i)
      sums[i] += sums[half + i];
    size = half;
  }
  return sums[0];
}

// rule.trust_ratio.
double trust_ratio(const Options &o, double w_norm, double q) {
  if (!o.adapt)
    return 1;
  double d = q;
  if (o.denominator == Denominator::paper)
    d = d + o.weight_decay * w_norm;
  d = d + o.eps;
  double ratio = o.trust_coefficient * w_norm;
  ratio = ratio / (d <= 0 ? 1 : d);
  if (o.clip) {
    ratio = ratio / (o.lr <= 0 ? 1 : o.lr);
    ratio = ratio > 1 || o.lr <= 0 ? 1 : ratio;
  }
  return w_norm <= o.threshold || (o.zero_guard && q <= 0) ? 1 : ratio;
}

// What threads have found of a layer. The last of them to add its part sums it all up.
class Sums {
public:
  void expect(std::int64_t blocks, int arrays) {
    for (int i = 0; i < arrays; ++i)
      sums_[i].resize(blocks);
    missing_ = blocks;
  }
  double *of(int array) { return sums_[array].empty() ? nullptr : sums_[array].data(); }
  double length(int array) { return std::sqrt(fold(sums_[array])); }
  bool add(std::int64_t blocks) { return missing_.fetch_sub(blocks) == blocks; }

private:
  std::vector<double> sums_[2];
  std::atomic<std::int64_t> missing_{0};
};

struct Work {
  Sums before, after;
  std::atomic<bool> measured{false};
};

struct Task {
  int layer;
  std::int64_t first, last;
  bool measure, move;
};

class Step {
public:
  Step(const Options &o, const std::vector<Layer> &layers, Lengths *lengths,
       Loops::Move Loops::*move)
      : o_(o), layers_(layers), lengths_(lengths),
        loops_(loops(o.weights, o.gradients)), move_(move ? loops_.*move : nullptr),
        work_(layers.size()) {}

  void run(int threads) {
    std::int64_t total = 0;
    for (const Layer &layer : layers_)
      total += layer.size;
    plan(total < alone ? 1 : threads);
    parallel(int(tasks_.size()), total < alone ? 1 : threads,
             [this](int i) { perform(tasks_[i]); });
  }

private:
  // The largest come first. Tasks are taken in this order: who waits for a length waits
  // for threads that are at work on it. The move begins where the measuring has ended,
  // with what is still in cache.
  void plan(int threads) {
    std::vector<int> order(layers_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](int a, int b) {
      return layers_[a].size > layers_[b].size;
    });
    for (int i : order) {
      const std::int64_t n = blocks(layers_[i]);
      expect(i, n);
      if (threads == 1 || layers_[i].size <= whole) {
        tasks_.push_back({i, 0, n, true, move_ != nullptr});
        continue;
      }
      for (std::int64_t k = 0; k < n; k += piece)
        tasks_.push_back({i, k, std::min(k + piece, n), true, false});
      for (std::int64_t k = n; move_ && k > 0; k -= std::min(k, piece))
        tasks_.push_back({i, std::max(k - piece, std::int64_t(0)), k, false, true});
    }
  }

  void expect(int i, std::int64_t n) {
    work_[i].before.expect(n, 2);
    if (o_.measure_result)
      work_[i].after.expect(n, 1);
  }

  void perform(const Task &task) {
    if (task.measure)
      measure(task);
    if (!task.move)
      return;
    wait_for(work_[task.layer].measured);
    for (std::int64_t last = task.last; last > task.first; last -= piece) {
      const std::int64_t first = std::max(task.first, last - piece);
      move(task.layer, first, last);
    }
  }

  void measure(const Task &task) {
    const Layer &layer = layers_[task.layer];
    Work &work = work_[task.layer];
    Lengths &lengths = lengths_[task.layer];
    if (lengths.weight < 0)
      loops_.square_weights(o_, layer, task.first, task.last, work.before.of(0));
    if (lengths.denominator < 0)
      loops_.square_measured(o_, layer, task.first, task.last, work.before.of(1));
    if (!work.before.add(task.last - task.first))
      return;
    if (lengths.weight < 0)
      lengths.weight = work.before.length(0);
    if (lengths.denominator < 0)
      lengths.denominator = work.before.length(1);
    lengths.ratio = trust_ratio(o_, lengths.weight, lengths.denominator);
    work.measured.store(true, std::memory_order_release);
  }

  void move(int i, std::int64_t first, std::int64_t last) {
    move_(o_, layers_[i], lengths_[i].ratio, first, last);
    if (!o_.measure_result)
      return;
    Sums &after = work_[i].after;
    loops_.square_result(o_, layers_[i], first, last, after.of(0));
    if (after.add(last - first))
      lengths_[i].result = after.length(0);
  }

  static void wait_for(const std::atomic<bool> &done) {
    for (int spins = 0; !done.load(std::memory_order_acquire); ++spins)
      if (spins > 1000)
        std::this_thread::yield();
  }

  const Options &o_;
  const std::vector<Layer> &layers_;
  Lengths *lengths_;
  const Loops &loops_;
  const Loops::Move move_;
  std::vector<Work> work_;
  std::vector<Task> tasks_;
};

} // namespace

const Loops &loops(Dtype weights, Dtype gradients) {
#if defined(LARSKIT_X86)
  static const auto best = [] {
    __builtin_cpu_init();
    // Each AVX2 processor has F16C too, of which clang 14 has not heard.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? loops_avx512 : avx2 ? loops_avx2 : loops_baseline;
  }();
  return best(weights, gradients);
#else
  return loops_baseline(weights, gradients);
#endif
}

void step(const Options &o, const std::vector<Layer> &layers, Lengths *lengths,
          int threads) {
  Step(o, layers, lengths, &Loops::update).run(threads);
}

void measure(const Options &o, const std::vector<Layer> &layers, Lengths *lengths,
             int threads) {
  Step(o, layers, lengths, nullptr).run(threads);
}

void rescale(const Options &o, const std::vector<Layer> &layers, Lengths *lengths,
             int threads) {
  Step(o, layers, lengths, &Loops::rescale).run(threads);
}

} // namespace larskit
