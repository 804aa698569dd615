#include "kernel.hpp"

#include "pool.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace larskit {
namespace {

// Pieces of a layer that is too large for one thread, and what a group must hold to be
// worth the waking of another.
constexpr std::int64_t piece = 64, alone = 32 * 1024;

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

// A layer in work, and the sums of its blocks.
struct Work {
  std::vector<double> weights, measured;
  Lengths lengths;
};

struct Piece {
  int layer;
  std::int64_t first, last;
};

class Step {
public:
  Step(const Options &o, const std::vector<Layer> &layers,
       const std::vector<Lengths> &known)
      : o_(o), layers_(layers), known_(known), work_(layers.size()) {}

  std::vector<Lengths> run(int threads) {
    std::int64_t total = 0;
    for (const Layer &layer : layers_)
      total += layer.size;
    if (total < alone)
      threads = 1;
    sort(threads == 1 ? total : total / (2 * threads));
    parallel(int(pieces_.size()), threads, [this](int i) { measure(pieces_[i]); });
    for (int i : large_)
      finish(i);
    int split = int(pieces_.size());
    parallel(split + int(small_.size()), threads, [this, split](int i) {
      if (i < split)
        update(pieces_[i]);
      else
        whole(small_[i - split]);
    });
    std::vector<Lengths> found;
    for (const Work &work : work_)
      found.push_back(work.lengths);
    return found;
  }

private:
  // Layers over `limit` are cut into pieces; the others are for one thread each, so that
  // the update finds in cache what the norms have read. The largest come first.
  void sort(std::int64_t limit) {
    std::vector<int> order(layers_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [this](int a, int b) {
      return layers_[a].size > layers_[b].size;
    });
    for (int i : order) {
      if (layers_[i].size <= limit) {
        small_.push_back(i);
        continue;
      }
      large_.push_back(i);
      prepare(i);
      for (std::int64_t k = 0; k < blocks(layers_[i]); k += piece)
        pieces_.push_back({i, k, std::min(k + piece, blocks(layers_[i]))});
    }
  }

  void prepare(int i) {
    if (known_.empty()) {
      work_[i].weights.resize(blocks(layers_[i]));
      work_[i].measured.resize(blocks(layers_[i]));
    }
  }

  void measure(const Piece &p) {
    if (!known_.empty())
      return;
    const Layer &layer = layers_[p.layer];
    Work &work = work_[p.layer];
    loops_.square_weights(o_, layer, p.first, p.last, work.weights.data());
    loops_.square_measured(o_, layer, p.first, p.last, work.measured.data());
  }

  void finish(int i) {
    Work &work = work_[i];
    if (known_.empty()) {
      work.lengths.weight = std::sqrt(fold(work.weights));
      work.lengths.denominator = std::sqrt(fold(work.measured));
    } else
      work.lengths = known_[i];
    work.lengths.ratio = trust_ratio(o_, work.lengths.weight, work.lengths.denominator);
  }

  void update(const Piece &p) {
    double ratio = work_[p.layer].lengths.ratio;
    loops_.update(o_, layers_[p.layer], ratio, p.first, p.last);
  }

  void whole(int i) {
    Piece all{i, 0, blocks(layers_[i])};
    prepare(i);
    measure(all);
    finish(i);
    update(all);
  }

  const Options &o_;
  const std::vector<Layer> &layers_;
  const std::vector<Lengths> &known_;
  const Loops &loops_ = loops();
  std::vector<Work> work_;
  std::vector<Piece> pieces_;
  std::vector<int> large_, small_;
};

} // namespace

const Loops &loops() {
#if defined(LARSKIT_X86)
  static const Loops &best = [&]() -> const Loops & {
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
      return loops_avx512;
    return avx2 ? loops_avx2 : loops_baseline;
  }();
  return best;
#else
  return loops_baseline;
#endif
}

std::vector<Lengths> step(const Options &o, const std::vector<Layer> &layers,
                          int threads, const std::vector<Lengths> &known) {
  return Step(o, layers, known).run(threads);
}

} // namespace larskit
