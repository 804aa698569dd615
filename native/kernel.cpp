#include "kernel.hpp"

#include "pool.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

namespace larskit {
namespace {

// In elements: the largest layer that one thread takes whole. Its weights and gradient are
// then still in that thread's cache when it writes the results.
constexpr std::int64_t undivided = 256 * 1024;

// In blocks: what a thread takes of a larger layer. It is also what is written at a time
// where results are measured, so that they are read from the cache.
constexpr std::int64_t chunk = 64;

// In elements: new arrays of a group as large as this are written past the caches. Of
// smaller ones the caches still hold a part when the next reader comes.
constexpr std::int64_t past_caches = 8 * 1024 * 1024;

std::int64_t blocks(const Layer &layer) {
  return std::max<std::int64_t>(1, (layer.size + block - 1) / block);
}

// norm._fold: the upper half onto the lower one, until one number is left. It does not
// depend on which thread has found which sum.
double fold(double *sums, std::int64_t size) {
  while (size > 1) {
    const std::int64_t half = (size + 1) / 2;
    for (std::int64_t i = 0; i < size - half; ++i)
      sums[i] += sums[half + i];
    size = half;
  }
  return sums[0];
}

// rule.trust_ratio. NaN fails every comparison, and so stays.
double trust_ratio(const Options &o, bool adapt, double w_norm, double q) {
  if (!adapt)
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

void wait_for(const std::atomic<bool> &done) {
  for (int spins = 0; !done.load(std::memory_order_acquire); ++spins)
    if (spins > 1000)
      std::this_thread::yield();
}

} // namespace

// What is asked for in one call.
struct Batch::Call {
  Call(const Options &o, Stats *stats, Loops::Write write = nullptr)
      : stats(stats), write(write), decayed_(o), plain_(o) {
    plain_.weight_decay = 0; // not wd*w with wd = 0: that is NaN where w is infinite
  }

  const Options &options(const Layer &layer) const {
    return layer.decay ? decayed_ : plain_;
  }

  Stats *stats;
  Loops::Write write;
  bool update_norms = false, result_norms = false;

private:
  Options decayed_, plain_;
};

Batch::Batch(Dtype weights, Dtype gradients, std::vector<Layer> layers)
    : layers(std::move(layers)), loops_(loops(weights, gradients)), starts_{0},
      progress_(new Progress[this->layers.size()]) {
  for (const Layer &layer : this->layers) {
    starts_.push_back(starts_.back() + blocks(layer));
    size_ += layer.size;
  }
}

void Batch::measure(const Options &o, Stats *stats, int threads) {
  run(Call(o, stats), threads);
}

void Batch::step(const Options &o, Stats *stats, int threads, bool update_norms,
                 bool result_norms) {
  Call call(o, stats, loops_.step);
  call.update_norms = update_norms;
  call.result_norms = result_norms;
  run(call, threads);
}

void Batch::scale(const Options &o, Stats *stats, int threads) {
  const bool in_place = layers.front().result == layers.front().gradient;
  const bool cached = in_place || size_ < past_caches;
  run(Call(o, stats, cached ? loops_.scale : loops_.scale_past_caches), threads);
}

void Batch::run(const Call &call, int threads) {
  if (size_ < serial_below)
    threads = 1;
  plan(threads > 1);
  const int arrays = call.update_norms || call.result_norms ? 4 : 2;
  if (sums_.size() < std::size_t(arrays * starts_.back()))
    sums_.resize(arrays * starts_.back());
  for (std::size_t i = 0; i < layers.size(); ++i) { // relaxed: the pool has a lock
    const std::int64_t n = starts_[i + 1] - starts_[i];
    progress_[i].unmeasured.store(n, std::memory_order_relaxed);
    progress_[i].unwritten.store(n, std::memory_order_relaxed);
    progress_[i].measured.store(false, std::memory_order_relaxed);
  }
  parallel(int(tasks_.size()), threads, [&](int i) { perform(call, tasks_[i]); });
}

// Threads take the tasks in this order, the largest layers first. Who waits for a layer to
// be measured so waits for threads that are measuring it, never for a task that nobody has
// taken. Writing starts where measuring has ended, with what is still in the cache.
void Batch::plan(bool divides) {
  if (!tasks_.empty() && divides == divides_)
    return;
  tasks_.clear();
  divides_ = divides;
  std::vector<int> order(layers.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [this](int a, int b) { return layers[a].size > layers[b].size; });
  for (int i : order) {
    const std::int64_t n = blocks(layers[i]);
    if (!divides || layers[i].size <= undivided) {
      tasks_.push_back({i, 0, n, true, true});
      continue;
    }
    for (std::int64_t k = 0; k < n; k += chunk)
      tasks_.push_back({i, k, std::min(k + chunk, n), true, false});
    for (std::int64_t k = n; k > 0; k -= std::min(k, chunk))
      tasks_.push_back({i, std::max(k - chunk, std::int64_t(0)), k, false, true});
  }
}

void Batch::perform(const Call &call, const Task &task) {
  if (task.measures)
    measure(call, task);
  if (!task.writes || !call.write)
    return;
  wait_for(progress_[task.layer].measured);
  for (std::int64_t last = task.last; last > task.first; last -= chunk)
    write(call, {task.layer, std::max(task.first, last - chunk), last, false, true});
}

// Weights and gradient take turns, block by block: while one is summed up, the other is on
// its way from memory. The last thread to measure a part adds up the sums of all parts.
void Batch::measure(const Call &call, const Task &task) {
  const int i = task.layer;
  const Layer &layer = layers[i];
  const Options &o = call.options(layer);
  Stats &stats = call.stats[i];
  const std::int64_t n = task.last - task.first;
  for (std::int64_t k = task.first; k < task.last; ++k) {
    if (stats.weight_norm < 0)
      loops_.weights(o, layer, k, k + 1, sums(i, of_weights));
    if (stats.gradient_norm < 0)
      loops_.gradient(o, layer, k, k + 1, sums(i, of_gradient));
  }
  if (progress_[i].unmeasured.fetch_sub(n) != n)
    return;
  if (stats.weight_norm < 0)
    stats.weight_norm = norm(i, of_weights);
  if (stats.gradient_norm < 0)
    stats.gradient_norm = norm(i, of_gradient);
  stats.trust_ratio =
      trust_ratio(o, layer.adapt, stats.weight_norm, stats.gradient_norm);
  progress_[i].measured.store(true, std::memory_order_release);
}

void Batch::write(const Call &call, const Task &task) {
  const int i = task.layer;
  const Layer &layer = layers[i];
  const Options &o = call.options(layer);
  Stats &stats = call.stats[i];
  const std::int64_t n = task.last - task.first;
  call.write(o, layer, stats.trust_ratio, task.first, task.last,
             call.update_norms ? sums(i, of_update) : nullptr);
  if (call.result_norms)
    loops_.result(o, layer, task.first, task.last, sums(i, of_result));
  if (progress_[i].unwritten.fetch_sub(n) != n)
    return;
  if (call.update_norms)
    stats.update_norm = norm(i, of_update);
  if (call.result_norms)
    stats.result_norm = norm(i, of_result);
}

double *Batch::sums(int layer, Sums of) {
  return sums_.data() + of * starts_.back() + starts_[layer];
}

double Batch::norm(int layer, Sums of) {
  return std::sqrt(fold(sums(layer, of), starts_[layer + 1] - starts_[layer]));
}

const Loops &loops(Dtype weights, Dtype gradients) {
#if defined(LARSKIT_X86)
  static const auto best = [] {
    __builtin_cpu_init();
    // Each AVX2 processor has F16C too, a name that clang 14 does not know.
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

} // namespace larskit
