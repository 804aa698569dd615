// Several threads call the kernel at once, each with layers of its own, of which each step
// needs the threads of the pool. Built with the thread sanitizer by test_sanitizers.py.
#include "kernel.hpp"
#include "pool.hpp"

#include <cstdio>
#include <thread>
#include <vector>

using namespace larskit;

namespace {

constexpr std::int64_t sizes[] = {700'001, 3, 40'000, 0, 300'007};
constexpr int callers = 4, steps = 6;

Options options() {
  Options o{};
  o.momentum = 0.9;
  o.weight_decay = 1e-4;
  o.trust_coefficient = 1e-3;
  o.lr = 0.1;
  o.zero_guard = true;
  return o;
}

struct Arrays {
  std::vector<float> weights, gradient, buffer;
};

// Returns one weight of each layer after some steps, and the norms of the last one.
std::vector<double> result(int threads) {
  std::vector<Arrays> arrays;
  for (std::int64_t size : sizes)
    arrays.push_back({std::vector<float>(size, 1.0f), std::vector<float>(size, 0.5f),
                      std::vector<float>(size, 0.0f)});
  std::vector<Layer> layers;
  for (Arrays &a : arrays)
    layers.push_back({a.weights.data(), a.gradient.data(), a.buffer.data(),
                      a.weights.data(), a.buffer.data(),
                      std::int64_t(a.weights.size()), true, true, true});
  Batch batch(Dtype::float32, Dtype::float32, layers, false);
  std::vector<double> found;
  for (int i = 0; i < steps; ++i) {
    std::vector<Stats> stats(layers.size(), Stats{-1, -1, -1, -1, -1});
    batch.measure(options(), stats.data(), threads);
    batch.step(options(), stats.data(), threads, i % 2 == 0);
    if (i + 1 == steps)
      for (const Stats &s : stats)
        found.insert(found.end(), {s.weight_norm, s.gradient_norm, s.trust_ratio});
  }
  for (const Arrays &a : arrays)
    found.push_back(a.weights.empty() ? 0 : a.weights.back());
  return found;
}

} // namespace

int main() {
  const auto expected = result(1);
  std::vector<std::vector<double>> found(callers);
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i)
    threads.emplace_back([&found, i] { found[i] = result(2 + i); });
  for (auto &thread : threads)
    thread.join();
  int equal = 0;
  for (const auto &own : found)
    equal += own == expected;
  std::printf("%d of %d are equal\n", equal, callers);
}
