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

// The layers of a group, which stay where they are; only their gradients move. `scales`
// where the results are gradients, not weights.
class Group {
public:
  Group(Dtype weight_dtype, Dtype gradient_dtype, const Addresses &weights,
        const Addresses &gradients, const Addresses &buffers, const Addresses &results,
        const Addresses &new_buffers, const std::vector<std::int64_t> &sizes,
        const std::vector<bool> &adapt, const std::vector<bool> &decay, bool scales)
      : gradient_bytes_(bytes(gradient_dtype)), scales_(scales),
        batch_(weight_dtype, gradient_dtype,
               layers(weights, gradients, buffers, results, new_buffers, sizes, adapt,
                      decay)) {
    const int width = bytes(weight_dtype);
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      write(results[i], sizes[i] * (scales ? gradient_bytes_ : width));
      write(new_buffers[i], sizes[i] * width);
    }
    std::sort(written_.begin(), written_.end());
    for (std::size_t i = 1; i < written_.size(); ++i)
      collides_ |= written_[i - 1].last > written_[i].first;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const bool in_place = weights[i] == results[i] && !scales;
      collides_ |= !in_place && hit(weights[i], sizes[i] * width);
      collides_ |= buffers[i] != new_buffers[i] && hit(buffers[i], sizes[i] * width);
    }
  }

  // Whether what is written overlaps something else that is read or written. Threads
  // would then read what others have written already.
  bool collides() const {
    bool found = collides_;
    for (const Layer &layer : batch_.layers) {
      const auto gradient = reinterpret_cast<std::uintptr_t>(layer.gradient);
      const bool in_place = layer.gradient == layer.result && scales_;
      found |= !in_place && hit(gradient, layer.size * gradient_bytes_);
    }
    return found;
  }

  // Keep what the arrays look like, for `rebind`; false where this cannot be read.
  bool snapshot(nb::capsule exchange, nb::list fixed, nb::list gradients) {
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

  // Use other gradients, as many; false if an array looks otherwise than it did, or a
  // fixed one is elsewhere.
  bool rebind(nb::list fixed, nb::list gradients) {
    auto look = looks_.begin();
    for (nb::handle x : fixed)
      if (!look++->unmoved(*exchange_, x))
        return false;
    look = gradient_looks_.begin();
    auto layer = batch_.layers.begin();
    for (nb::handle x : gradients) {
      void *gradient;
      if (!look++->same(*exchange_, x, gradient))
        return false;
      layer++->gradient = gradient;
    }
    return !collides();
  }

  // Use gradients that are laid out as the present ones.
  void point(const Addresses &gradients) {
    for (std::size_t i = 0; i < gradients.size(); ++i)
      batch_.layers[i].gradient = pointer(gradients[i]);
  }

  void step(const Options &options, std::uintptr_t stats, int threads,
            bool update_norms, bool result_norms) {
    without_lock(
        [&] { batch_.step(options, at(stats), threads, update_norms, result_norms); });
    for (Layer &layer : batch_.layers)
      layer.buffer = layer.new_buffer;
  }

  void scale(const Options &options, std::uintptr_t stats, int threads) {
    without_lock([&] { batch_.scale(options, at(stats), threads); });
  }

  void measure(const Options &options, std::uintptr_t stats, int threads) {
    without_lock([&] { batch_.measure(options, at(stats), threads); });
  }

private:
  static std::vector<Layer> layers(const Addresses &weights, const Addresses &gradients,
                                   const Addresses &buffers, const Addresses &results,
                                   const Addresses &new_buffers,
                                   const std::vector<std::int64_t> &sizes,
                                   const std::vector<bool> &adapt,
                                   const std::vector<bool> &decay) {
    std::vector<Layer> found;
    for (std::size_t i = 0; i < sizes.size(); ++i)
      found.push_back({pointer(weights[i]), pointer(gradients[i]), pointer(buffers[i]),
                       pointer(results[i]), pointer(new_buffers[i]), sizes[i], adapt[i],
                       decay[i]});
    return found;
  }

  static int bytes(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  }

  static void *pointer(std::uintptr_t address) {
    return reinterpret_cast<void *>(address);
  }

  static Stats *at(std::uintptr_t address) {
    return static_cast<Stats *>(pointer(address));
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

  std::vector<Span> written_; // sorted
  int gradient_bytes_;
  bool scales_, collides_ = false;
  Batch batch_;
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

// Scale a gradient in place, if the two are contiguous arrays of one dtype that this can
// read.
bool scale_array(const Options &options, nb::handle weights, nb::handle gradient,
                 int threads) {
  const Borrowed w(weights, 0), g(gradient, PyBUF_WRITABLE);
  if (!w || !g || !alike(*w, *g) || !apart(*w, *g))
    return false;
  const std::string format = (*w).format;
  Dtype dtype;
  if (format == "f")
    dtype = Dtype::float32;
  else if (format == "d")
    dtype = Dtype::float64;
  else if (format == "e")
    dtype = Dtype::float16;
  else
    return false;
  const auto size = std::int64_t((*w).len / (*w).itemsize);
  Batch batch(dtype, dtype,
              {{(*w).buf, (*g).buf, nullptr, (*g).buf, nullptr, size, true, true}});
  Stats stats{-1, -1, -1, -1, -1};
  without_lock([&] { batch.scale(options, &stats, threads); });
  return true;
}

// A field of a Config. Tensors of one element are numbers too: `float` reads them.
template <class T> T read(nb::handle x);
template <> double read(nb::handle x) { return nb::cast<double>(nb::float_(x)); }
template <> bool read(nb::handle x) { return nb::cast<bool>(nb::bool_(x)); }

template <> Denominator read(nb::handle x) {
  const auto name = nb::cast<std::string>(x);
  if (name == "paper")
    return Denominator::paper;
  if (name == "decayed_gradient")
    return Denominator::decayed_gradient;
  if (name == "gradient")
    return Denominator::gradient;
  return Denominator::momentum;
}

template <> LrPlacement read(nb::handle x) {
  return nb::cast<std::string>(x) == "inside" ? LrPlacement::inside
                                              : LrPlacement::outside;
}

} // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false); // optimizers live until the interpreter ends
  nb::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  nb::class_<Options>(m, "Options")
      .def("__init__", [](Options *o, nb::handle config, double lr) {
#define LARSKIT_READ(type, name) read<type>(config.attr(#name)),
        new (o) Options{LARSKIT_FIELDS(LARSKIT_READ) lr};
#undef LARSKIT_READ
      });
  nb::class_<Group>(m, "Group")
      .def(nb::init<Dtype, Dtype, const Addresses &, const Addresses &, const Addresses &,
                    const Addresses &, const Addresses &,
                    const std::vector<std::int64_t> &, const std::vector<bool> &,
                    const std::vector<bool> &, bool>())
      .def("collides", &Group::collides)
      .def("snapshot", &Group::snapshot)
      .def("rebind", &Group::rebind)
      .def("point", &Group::point)
      .def("step", &Group::step)
      .def("scale", &Group::scale)
      .def("measure", &Group::measure);
  m.def("scale_array", &scale_array);
  m.attr("serial_below") = serial_below;
#define LARSKIT_NAME(type, name) #name,
  const char *const fields[] = {LARSKIT_FIELDS(LARSKIT_NAME)};
#undef LARSKIT_NAME
  m.attr("FIELDS") = std::vector<std::string>(std::begin(fields), std::end(fields));
  m.def("end", &end);
  m.def("variant", [] {
    return std::string(loops(Dtype::float32, Dtype::float32).name);
  });
}
