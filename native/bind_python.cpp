// The Python module: it takes addresses that larskit/engines/native.py has checked.
#include "kernel.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <thread>

namespace nb = nanobind;
using namespace larskit;
using Addresses = std::vector<std::uintptr_t>;

namespace {

// Threads that are inside the kernel, and whether the interpreter is about to end: then
// nobody may wait for its lock any more.
std::atomic<int> inside{0};
std::atomic<bool> ending{false};

template <class F> void without_lock(F f) {
  if (ending)
    return f();
  ++inside;
  {
    nb::gil_scoped_release release;
    f();
  }
  --inside;
}

void end() {
  ending = true;
  while (inside) {
    nb::gil_scoped_release release;
    std::this_thread::yield();
  }
}

struct Span {
  std::uintptr_t first, last;
  bool operator<(const Span &o) const { return first < o.first; }
};

// The layers of a group, which stay where they are; only their gradients move. `rescales`
// where the results are gradients, not weights.
class Group {
public:
  Group(const Addresses &weights, const Addresses &buffers, const Addresses &results,
        const Addresses &new_buffers, const std::vector<std::int64_t> &sizes, int bytes,
        int gradient_bytes, bool rescales)
      : gradient_bytes_(gradient_bytes), rescales_(rescales) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      layers_.push_back({pointer(weights[i]), nullptr, pointer(buffers[i]),
                         pointer(results[i]), pointer(new_buffers[i]), sizes[i]});
      write(results[i], sizes[i] * (rescales ? gradient_bytes : bytes));
      write(new_buffers[i], sizes[i] * bytes);
    }
    std::sort(written_.begin(), written_.end());
    for (std::size_t i = 1; i < written_.size(); ++i)
      collides_ |= written_[i - 1].last > written_[i].first;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const bool in_place = weights[i] == results[i] && !rescales;
      collides_ |= !in_place && hit(weights[i], sizes[i] * bytes);
      collides_ |= buffers[i] != new_buffers[i] && hit(buffers[i], sizes[i] * bytes);
    }
  }

  // Whether what is written lies over something else that is read or written.
  bool collides(const Addresses &gradients) const {
    bool found = collides_;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const bool in_place = pointer(gradients[i]) == layers_[i].result && rescales_;
      found |= !in_place && hit(gradients[i], layers_[i].size * gradient_bytes_);
    }
    return found;
  }

  void step(const Options &options, const Addresses &gradients, std::uintptr_t lengths,
            int threads) {
    run(larskit::step, options, gradients, lengths, threads);
    for (Layer &layer : layers_)
      layer.buffer = layer.new_buffer;
  }

  void rescale(const Options &options, const Addresses &gradients,
               std::uintptr_t lengths, int threads) {
    run(larskit::rescale, options, gradients, lengths, threads);
  }

  void measure(const Options &options, std::uintptr_t lengths, int threads) {
    run(larskit::measure, options, Addresses(layers_.size()), lengths, threads);
  }

private:
  static void *pointer(std::uintptr_t address) {
    return reinterpret_cast<void *>(address);
  }

  void write(std::uintptr_t first, std::int64_t bytes) {
    if (first && bytes)
      written_.push_back({first, first + bytes});
  }

  bool hit(std::uintptr_t first, std::int64_t bytes) const {
    const auto after =
        std::lower_bound(written_.begin(), written_.end(), Span{first + bytes, 0});
    return first && bytes && after != written_.begin() && std::prev(after)->last > first;
  }

  template <class F>
  void run(F f, const Options &options, const Addresses &gradients,
           std::uintptr_t lengths, int threads) {
    for (std::size_t i = 0; i < layers_.size(); ++i)
      layers_[i].gradient = pointer(gradients[i]);
    without_lock(
        [&] { f(options, layers_, static_cast<Lengths *>(pointer(lengths)), threads); });
  }

  std::vector<Layer> layers_;
  std::vector<Span> written_; // sorted
  int gradient_bytes_;
  bool rescales_, collides_ = false;
};

} // namespace

NB_MODULE(_native, m) {
  nb::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  nb::enum_<Denominator>(m, "Denominator")
      .value("paper", Denominator::paper)
      .value("decayed_gradient", Denominator::decayed_gradient)
      .value("gradient", Denominator::gradient)
      .value("momentum", Denominator::momentum);
  nb::class_<Options>(m, "Options")
      .def(nb::init<>())
      .def_rw("weights", &Options::weights)
      .def_rw("gradients", &Options::gradients)
      .def_rw("denominator", &Options::denominator)
      .def_rw("inside", &Options::inside)
      .def_rw("nesterov", &Options::nesterov)
      .def_rw("clip", &Options::clip)
      .def_rw("adapt", &Options::adapt)
      .def_rw("maximize", &Options::maximize)
      .def_rw("zero_guard", &Options::zero_guard)
      .def_rw("measure_result", &Options::measure_result)
      .def_rw("lr", &Options::lr)
      .def_rw("momentum", &Options::momentum)
      .def_rw("weight_decay", &Options::weight_decay)
      .def_rw("trust_coefficient", &Options::trust_coefficient)
      .def_rw("eps", &Options::eps)
      .def_rw("dampening", &Options::dampening)
      .def_rw("threshold", &Options::threshold);
  nb::class_<Group>(m, "Group")
      .def(nb::init<const Addresses &, const Addresses &, const Addresses &,
                    const Addresses &, const std::vector<std::int64_t> &, int, int,
                    bool>())
      .def("collides", &Group::collides)
      .def("step", &Group::step)
      .def("rescale", &Group::rescale)
      .def("measure", &Group::measure);
  m.def("end", &end);
  m.def("variant", [] {
    return std::string(loops(Dtype::float32, Dtype::float32).name);
  });
}
