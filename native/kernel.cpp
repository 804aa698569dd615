#include "kernel.hpp"

#include "pool.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

namespace larskit {
namespace {

// In blocks: what a thread takes of a larger layer at a time.
constexpr std::int64_t chunk = 64;

// In elements: new arrays of a group as large as this are written past the caches. Of
// smaller ones the caches still hold a part when the next reader comes.
constexpr std::int64_t past_caches = 8 * 1024 * 1024;

constexpr int nobody = -1; // measures a piece

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
  bool update_norms = false;

private:
  Options decayed_, plain_;
};

Batch::Batch(Dtype weights, Dtype gradients, std::vector<Layer> layers, bool with_torch)
    : layers(std::move(layers)), loops_(loops(weights, gradients)),
      with_torch_(with_torch), starts_{0}, progress_(new Progress[this->layers.size()]) {
  for (const Layer &layer : this->layers) {
    starts_.push_back(starts_.back() + blocks(layer));
    size_ += layer.size;
    carries_ |= layer.carries;
  }
}

void Batch::measure(const Options &o, Stats *stats, int threads) {
  run(Call(o, stats), threads);
}

void Batch::step(const Options &o, Stats *stats, int threads, bool update_norms) {
  Call call(o, stats, loops_.step);
  call.update_norms = update_norms;
  run(call, threads);
}

void Batch::scale(const Options &o, Stats *stats, int threads) {
  const bool in_place = layers.front().result == layers.front().gradient;
  const bool cached = in_place || size_ < past_caches;
  run(Call(o, stats, cached ? loops_.scale : loops_.scale_past_caches), threads);
}

void Batch::run(const Call &call, int threads) {
  plan(size_ < (with_torch_ ? serial_below_with_torch : serial_below) ? 1 : threads);
  const int arrays = call.update_norms || carries_ ? 4 : 2;
  if (sums_.size() < std::size_t(arrays * starts_.back()))
    sums_.resize(arrays * starts_.back());
  for (std::size_t i = 0; i < layers.size(); ++i) { // relaxed: threads start with a lock
    const std::int64_t n = starts_[i + 1] - starts_[i];
    progress_[i].unmeasured.store(n, std::memory_order_relaxed);
    progress_[i].unwritten.store(n, std::memory_order_relaxed);
    progress_[i].measured.store(false, std::memory_order_relaxed);
  }
  for (std::size_t i = 0; i < pieces_.size(); ++i) {
    claims_[i].measurer.store(nobody, std::memory_order_relaxed);
    claims_[i].written.store(false, std::memory_order_relaxed);
  }
  parallel(threads_, with_torch_, [&](int thread) { work(call, thread); });
}

// Each large layer is a section of its own, of which each thread has a contiguous share:
// it writes what it has measured itself, beginning with what it measured last and still
// has in its cache. All small layers together are the last section.
void Batch::plan(int threads) {
  if (threads == threads_)
    return;
  threads_ = 0; // until all is done: memory may run out
  pieces_.clear();
  shares_.clear();
  std::vector<int> order(layers.size()), whole;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [this](int a, int b) { return layers[a].size > layers[b].size; });
  for (int i : order) {
    if (threads == 1 || layers[i].size <= undivided) {
      whole.push_back(i);
      continue;
    }
    const std::int64_t n = blocks(layers[i]), count = (n + chunk - 1) / chunk;
    for (int thread = 0; thread <= threads; ++thread)
      shares_.push_back(int(pieces_.size() + count * thread / threads));
    for (std::int64_t k = 0; k < n; k += chunk)
      pieces_.push_back({i, k, std::min(k + chunk, n), false});
  }
  share_whole(whole, threads);
  claims_.reset(new Claim[pieces_.size()]);
  threads_ = threads;
}

// Give each layer to the thread that has the least so far, the largest first.
void Batch::share_whole(const std::vector<int> &order, int threads) {
  std::vector<std::vector<int>> dealt(threads);
  std::vector<std::int64_t> load(threads);
  for (int i : order) {
    const auto least = std::min_element(load.begin(), load.end()) - load.begin();
    dealt[least].push_back(i);
    load[least] += layers[i].size;
  }
  for (const auto &share : dealt) {
    shares_.push_back(int(pieces_.size()));
    for (int i : share)
      pieces_.push_back({i, 0, blocks(layers[i]), true});
  }
  shares_.push_back(int(pieces_.size()));
}

// Who waits for a layer to be measured waits for threads that are measuring it, never for
// a piece that nobody has claimed.
void Batch::work(const Call &call, int thread) {
  for (auto shares = shares_.begin(); shares != shares_.end(); shares += threads_ + 1) {
    const int begin = shares[0], end = shares[threads_];
    measure_section(call, thread, &*shares);
    if (begin == end || pieces_[begin].whole || !call.write)
      continue;
    wait_for(progress_[pieces_[begin].layer].measured);
    write_section(call, thread, begin, end);
  }
}

// The own share from its beginning, then what is left of the others', from the end.
void Batch::measure_section(const Call &call, int thread, const int *shares) {
  const auto claim = [&](int i) {
    int measurer = nobody;
    if (claims_[i].measurer.load(std::memory_order_relaxed) != nobody ||
        !claims_[i].measurer.compare_exchange_strong(measurer, thread))
      return;
    measure(call, pieces_[i]);
    if (pieces_[i].whole && call.write)
      write_backwards(call, pieces_[i]);
  };
  for (int i = shares[thread]; i < shares[thread + 1]; ++i)
    claim(i);
  for (int k = 1; k < threads_; ++k) {
    const int other = (thread + k) % threads_;
    for (int i = shares[other + 1]; i-- > shares[other];)
      claim(i);
  }
}

// What this thread measured last comes first; then what others have not come to yet.
void Batch::write_section(const Call &call, int thread, int begin, int end) {
  const auto claim = [&](int i) {
    if (!claims_[i].written.load(std::memory_order_relaxed) &&
        !claims_[i].written.exchange(true))
      write(call, pieces_[i]);
  };
  for (int i = end; i-- > begin;)
    if (claims_[i].measurer.load(std::memory_order_relaxed) == thread)
      claim(i);
  for (int i = begin; i < end; ++i)
    claim(i);
}

// Weights and gradient take turns, block by block: while one is summed up, the other is on
// its way from memory. The last thread to measure a part adds up the sums of all parts.
void Batch::measure(const Call &call, const Piece &piece) {
  const int i = piece.layer;
  const Layer &layer = layers[i];
  const Options &o = call.options(layer);
  Stats &stats = call.stats[i];
  const std::int64_t n = piece.last - piece.first;
  for (std::int64_t k = piece.first; k < piece.last; ++k) {
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

void Batch::write_backwards(const Call &call, const Piece &piece) {
  for (std::int64_t last = piece.last; last > piece.first; last -= chunk)
    write(call, {piece.layer, std::max(piece.first, last - chunk), last, false});
}

void Batch::write(const Call &call, const Piece &piece) {
  const int i = piece.layer;
  const Layer &layer = layers[i];
  const Options &o = call.options(layer);
  Stats &stats = call.stats[i];
  const std::int64_t n = piece.last - piece.first;
  call.write(o, layer, stats.trust_ratio, piece.first, piece.last,
             call.update_norms ? sums(i, of_update) : nullptr,
             layer.carries ? sums(i, of_result) : nullptr);
  if (progress_[i].unwritten.fetch_sub(n) != n)
    return;
  if (call.update_norms)
    stats.update_norm = norm(i, of_update);
  if (layer.carries)
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
