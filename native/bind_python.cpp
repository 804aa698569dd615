// The Python module: it takes addresses that larskit/engines/native.py has checked.
#include "kernel.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace nb = nanobind;
using namespace nanobind::literals;
using namespace larskit;
using Addresses = std::vector<std::uintptr_t>;

namespace {

// Threads that are inside the kernel, and whether the interpreter is about to end: then
// nobody may wait for its lock any more.
std::atomic<int> working{0};
std::atomic<bool> ending{false};

template <class F> void without_lock(F f) {
  if (ending)
    return f();
  ++working;
  {
    nb::gil_scoped_release release;
    f();
  }
  --working;
}

void end() {
  ending = true;
  while (working) {
    nb::gil_scoped_release release;
    std::this_thread::yield();
  }
}

// What DLPack lets a framework publish: functions that describe one of its tensors to
// whoever holds its Python object, without a call through Python.
struct Exchange {
  std::uint32_t major, minor;
  Exchange *older;
  void *others[3];
  int (*describe)(void *tensor, nb::dlpack::dltensor *);
};

// What an array looked like. Another one that looks so can take its place.
class Look {
public:
  Look(const Exchange &exchange, nb::handle x) : type_(Py_TYPE(x.ptr())) {
    const auto now = describe(exchange, x);
    data_ = now.data;
    dtype_ = now.dtype;
    device_ = now.device;
    shape_.assign(now.shape, now.shape + now.ndim);
    strides_.assign(now.strides, now.strides + now.ndim);
  }

  // Sets `data` to where the array begins now.
  bool same(const Exchange &exchange, nb::handle x, void *&data) const {
    if (Py_TYPE(x.ptr()) != type_)
      return false;
    const auto now = describe(exchange, x);
    data = now.data;
    return now.ndim == int(shape_.size()) &&
           std::equal(shape_.begin(), shape_.end(), now.shape) &&
           std::equal(strides_.begin(), strides_.end(), now.strides) &&
           std::memcmp(&now.dtype, &dtype_, sizeof dtype_) == 0 &&
           std::memcmp(&now.device, &device_, sizeof device_) == 0;
  }

  bool unmoved(const Exchange &exchange, nb::handle x) const {
    void *data;
    return same(exchange, x, data) && data == data_;
  }

private:
  static nb::dlpack::dltensor describe(const Exchange &exchange, nb::handle x) {
    nb::dlpack::dltensor out;
    if (exchange.describe(x.ptr(), &out))
      throw nb::python_error();
    return out;
  }

  PyTypeObject *type_;
  void *data_;
  nb::dlpack::dtype dtype_;
  nb::dlpack::device device_;
  std::vector<std::int64_t> shape_, strides_;
};

struct Span {
  std::uintptr_t first, last;
  bool operator<(const Span &o) const { return first < o.first; }
};

// The layers of a group, which stay where they are; only their gradients move. `rescales`
// where the results are gradients, not weights.
class Group {
public:
  Group(const Addresses &weights, const Addresses &gradients, const Addresses &buffers,
        const Addresses &results, const Addresses &new_buffers,
        const std::vector<std::int64_t> &sizes, int bytes, int gradient_bytes,
        bool rescales)
      : gradient_bytes_(gradient_bytes), rescales_(rescales) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      layers_.push_back({pointer(weights[i]), pointer(gradients[i]), pointer(buffers[i]),
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
  bool collides() const {
    bool found = collides_;
    for (const Layer &layer : layers_) {
      const auto gradient = reinterpret_cast<std::uintptr_t>(layer.gradient);
      const bool in_place = layer.gradient == layer.result && rescales_;
      found |= !in_place && hit(gradient, layer.size * gradient_bytes_);
    }
    return found;
  }

  // Keep what the arrays look like, for `aim`; false where this cannot be read.
  bool remember(nb::capsule exchange, nb::list fixed, nb::list gradients) {
    exchange_ = static_cast<const Exchange *>(exchange.data());
    while (exchange_ && exchange_->major != 1)
      exchange_ = exchange_->older;
    if (!exchange_ || !exchange_->describe)
      return false;
    for (nb::handle x : fixed)
      looks_.emplace_back(*exchange_, x);
    for (nb::handle x : gradients)
      gradient_looks_.emplace_back(*exchange_, x);
    return true;
  }

  // Take other gradients, as many; false if something does not look as it did, or moved.
  bool aim(nb::list fixed, nb::list gradients) {
    auto look = looks_.begin();
    for (nb::handle x : fixed)
      if (!look++->unmoved(*exchange_, x))
        return false;
    look = gradient_looks_.begin();
    auto layer = layers_.begin();
    for (nb::handle x : gradients) {
      void *gradient;
      if (!look++->same(*exchange_, x, gradient))
        return false;
      layer++->gradient = gradient;
    }
    return !collides();
  }

  void step(const Options &options, std::uintptr_t lengths, int threads) {
    run(larskit::step, options, lengths, threads);
    for (Layer &layer : layers_)
      layer.buffer = layer.new_buffer;
  }

  void rescale(const Options &options, std::uintptr_t lengths, int threads) {
    run(larskit::rescale, options, lengths, threads);
  }

  void measure(const Options &options, std::uintptr_t lengths, int threads) {
    run(larskit::measure, options, lengths, threads);
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
  void run(F f, const Options &options, std::uintptr_t lengths, int threads) const {
    without_lock(
        [&] { f(options, layers_, static_cast<Lengths *>(pointer(lengths)), threads); });
  }

  std::vector<Layer> layers_;
  std::vector<Span> written_; // sorted
  int gradient_bytes_;
  bool rescales_, collides_ = false;
  const Exchange *exchange_ = nullptr;
  std::vector<Look> looks_, gradient_looks_;
};

// The memory of an array, borrowed while this lives.
class Borrowed {
public:
  Borrowed(nb::handle x, int flags)
      : found_(!PyObject_GetBuffer(x.ptr(), &view_, flags | PyBUF_FORMAT | PyBUF_ND)) {
    if (!found_)
      PyErr_Clear();
  }
  Borrowed(const Borrowed &) = delete;
  ~Borrowed() {
    if (found_)
      PyBuffer_Release(&view_);
  }

  explicit operator bool() const { return found_; }
  const Py_buffer &operator*() const { return view_; }

private:
  Py_buffer view_;
  bool found_;
};

bool alike(const Py_buffer &a, const Py_buffer &b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape) &&
         std::strcmp(a.format, b.format) == 0;
}

bool apart(const Py_buffer &a, const Py_buffer &b) {
  auto *x = static_cast<char *>(a.buf), *y = static_cast<char *>(b.buf);
  return x + a.len <= y || y + b.len <= x;
}

// Rescale a gradient in place, if the two are contiguous arrays of one dtype that this
// can read.
bool rescale_array(const Options &options, nb::handle weights, nb::handle gradient,
                   int threads) {
  const Borrowed w(weights, 0), g(gradient, PyBUF_WRITABLE);
  if (!w || !g || !alike(*w, *g) || !apart(*w, *g))
    return false;
  const std::string format = (*w).format;
  Options o = options;
  if (format == "f")
    o.weights = o.gradients = Dtype::float32;
  else if (format == "d")
    o.weights = o.gradients = Dtype::float64;
  else if (format == "e")
    o.weights = o.gradients = Dtype::float16;
  else
    return false;
  const std::vector<Layer> layers{{(*w).buf, (*g).buf, nullptr, (*g).buf, nullptr,
                                   std::int64_t((*w).len / (*w).itemsize)}};
  Lengths lengths{-1, -1, -1, -1};
  without_lock([&] { rescale(o, layers, &lengths, threads); });
  return true;
}

} // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false); // optimizers live until the interpreter ends
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
      .def("__init__",
           [](Options *o, Dtype weights, Dtype gradients, Denominator denominator,
              bool inside, bool nesterov, bool clip, bool adapt, bool maximize,
              bool zero_guard, bool measure_result, double lr, double momentum,
              double weight_decay, double trust_coefficient, double eps,
              double dampening, double threshold) {
             new (o) Options{weights, gradients, denominator, inside, nesterov, clip,
                             adapt, maximize, zero_guard, measure_result, lr, momentum,
                             weight_decay, trust_coefficient, eps, dampening, threshold};
           },
           nb::kw_only(), "weights"_a, "gradients"_a, "denominator"_a, "inside"_a,
           "nesterov"_a, "clip"_a, "adapt"_a, "maximize"_a, "zero_guard"_a,
           "measure_result"_a, "lr"_a, "momentum"_a, "weight_decay"_a,
           "trust_coefficient"_a, "eps"_a, "dampening"_a, "threshold"_a);
  nb::class_<Group>(m, "Group")
      .def(nb::init<const Addresses &, const Addresses &, const Addresses &,
                    const Addresses &, const Addresses &,
                    const std::vector<std::int64_t> &, int, int, bool>())
      .def("collides", &Group::collides)
      .def("remember", &Group::remember)
      .def("aim", &Group::aim)
      .def("step", &Group::step)
      .def("rescale", &Group::rescale)
      .def("measure", &Group::measure);
  m.def("rescale_array", &rescale_array);
  m.attr("alone") = alone;
  m.def("end", &end);
  m.def("variant", [] {
    return std::string(loops(Dtype::float32, Dtype::float32).name);
  });
}
