// The Python module: it takes addresses that larskit/engines/native.py has checked.
#include "kernel.hpp"
#include "pool.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace nb = nanobind;
using namespace nanobind::literals;
using namespace larskit;

namespace {

// How many threads are inside the kernel, and whether the interpreter is about to end. From
// then on nobody may wait for its lock: a daemon thread would never get it.
std::atomic<int> working{0};
std::atomic<bool> ending{false};

#if !defined(_WIN32)
void forget_working() { working = 0; } // those threads are not in the child
const int registered = pthread_atfork(nullptr, nullptr, forget_working);
#endif

template <class F> void without_lock(F f) {
  if (ending)
    return f();
  struct Count {
    Count() { ++working; }
    ~Count() { --working; }
  } count;
  nb::gil_scoped_release release;
  f();
}

void end() {
  ending = true;
  while (working) {
    nb::gil_scoped_release release;
    std::this_thread::yield();
  }
}

// The enumerator whose name is the string `x`; `names` are in the order of the enum.
template <class E> E named(nb::handle x, std::initializer_list<const char *> names) {
  const auto name = nb::cast<std::string>(x);
  int i = 0;
  for (const char *candidate : names) {
    if (name == candidate)
      return E(i);
    ++i;
  }
  throw nb::value_error(("the kernel does not know " + name).c_str());
}

void read(nb::handle x, Dtype &out) {
  out = named<Dtype>(x, {"float32", "float64", "bfloat16", "float16"});
}
void read(nb::handle x, Denominator &out) {
  out = named<Denominator>(x, {"paper", "decayed_gradient", "gradient", "momentum"});
}
void read(nb::handle x, LrPlacement &out) {
  out = named<LrPlacement>(x, {"inside", "outside"});
}
void read(nb::handle x, bool &out) {
  const int truth = PyObject_IsTrue(x.ptr());
  if (truth < 0)
    throw nb::python_error();
  out = truth;
}
// Also of a tensor with one element, which is read now: it may have another value later.
void read(nb::handle x, double &out) {
  const auto number = nb::steal(PyNumber_Float(x.ptr()));
  if (!number)
    throw nb::python_error();
  out = nb::cast<double>(number);
}

Options options_of(nb::handle config, nb::handle lr) {
  Options o;
#define LARSKIT_READ(type, name) read(config.attr(#name), o.name);
  LARSKIT_FIELDS(LARSKIT_READ)
#undef LARSKIT_READ
  read(lr, o.lr);
  return o;
}

std::int64_t bytes(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// What DLPack lets a framework publish: functions that describe one of its tensors to a
// caller that holds its Python object, without a call through Python.
struct Exchange {
  std::uint32_t major, minor;
  Exchange *older;
  void *others[3];
  int (*describe)(void *tensor, nb::dlpack::dltensor *);
};

// What is known of an array. Another array of the same description can take its place.
class Snapshot {
public:
  Snapshot(const Exchange &exchange, nb::handle x) : type_(Py_TYPE(x.ptr())) {
    const auto now = describe(exchange, x);
    data_ = now.data;
    dtype_ = now.dtype;
    device_ = now.device;
    dims_ = now.ndim;
    extents_.assign(now.shape, now.shape + dims_);
    extents_.insert(extents_.end(), now.strides, now.strides + dims_);
  }

  // Sets `data` to where the array begins now. False also where its memory was freed.
  bool same(const Exchange &exchange, nb::handle x, void *&data) const {
    if (Py_TYPE(x.ptr()) != type_) // a subclass may compute otherwise
      return false;
    const auto now = describe(exchange, x);
    data = now.data;
    return (data || !data_) && now.ndim == dims_ && std::equal(now.shape, now.shape + dims_, shape()) &&
           std::equal(now.strides, now.strides + dims_, shape() + dims_) &&
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
  const std::int64_t *shape() const { return extents_.data(); }

  PyTypeObject *type_;
  void *data_;
  nb::dlpack::dtype dtype_;
  nb::dlpack::device device_;
  std::int32_t dims_;
  std::vector<std::int64_t> extents_; // the shape, then the strides
};

struct Span {
  std::uintptr_t first, last;
  bool operator<(const Span &o) const { return first < o.first; }
};

// The addresses of a layer's weights, gradient, buffer, result and new buffer, its size,
// and whether it is adapted, is decayed and carries its norm.
using Address = std::uintptr_t;
using Row = std::tuple<Address, Address, Address, Address, Address, std::int64_t, bool,
                       bool, bool>;

// Layers whose arrays stay where they are; only their gradients may be replaced. `scales`
// where the results are scaled gradients, not weights, and `in_place` where these are
// written over the gradients, wherever those are; `with_torch`: see `parallel`.
class Group {
public:
  Group(nb::str dtype, nb::str gradient_dtype, const std::vector<Row> &rows, bool scales,
        bool in_place, bool with_torch)
      : scales_(scales), scales_in_place_(scales && in_place) {
    Dtype weights, gradients;
    read(dtype, weights);
    read(gradient_dtype, gradients);
    std::vector<Layer> layers;
    for (const auto &[w, g, v, result, new_v, size, adapt, decay, carries] : rows)
      layers.push_back({pointer(w), pointer(g), pointer(v), pointer(result),
                        pointer(new_v), size, adapt, decay, carries});
    batch_ = std::make_unique<Batch>(weights, gradients, std::move(layers), with_torch);
    bytes_ = bytes(weights);
    gradient_bytes_ = bytes(gradients);
    index_written();
  }

  // Whether something that is written overlaps with what is read or written elsewhere:
  // threads would then read what others have written already.
  bool collides() const {
    bool found = collides_;
    for (const Layer &layer : batch_->layers)
      found |= !(scales_ && layer.gradient == layer.result) &&
               hit(layer.gradient, layer.size * gradient_bytes_);
    return found;
  }

  // Describe the arrays, for `rebind`; false where the framework's functions are of
  // another version.
  bool snapshot(nb::capsule exchange, nb::list fixed, nb::list gradients) {
    exchange_ = static_cast<const Exchange *>(exchange.data());
    while (exchange_ && exchange_->major != 1)
      exchange_ = exchange_->older;
    if (!exchange_ || !exchange_->describe)
      return false;
    for (nb::handle x : fixed)
      fixed_.emplace_back(*exchange_, x);
    for (nb::handle x : gradients)
      gradients_.emplace_back(*exchange_, x);
    return true;
  }

  // Use other gradients. False where their number or description differs, or that of a
  // fixed array: the group must then not be used.
  bool rebind(nb::list fixed, nb::list gradients) {
    if (in_use() || gradients.size() != batch_->layers.size())
      return false;
    auto known = fixed_.begin();
    for (nb::handle x : fixed)
      if (!known++->unmoved(*exchange_, x))
        return false;
    known = gradients_.begin();
    auto layer = batch_->layers.begin();
    bool moved = !fits_; // after a failure everything is checked again
    fits_ = false;
    for (nb::handle x : gradients) {
      void *gradient;
      if (!known++->same(*exchange_, x, gradient))
        return false;
      moved |= gradient != layer->gradient;
      layer->gradient = gradient;
      if (scales_in_place_)
        layer->result = gradient;
      ++layer;
    }
    if (moved && scales_in_place_)
      index_written();
    return fits_ = !moved || !collides();
  }

  // Use gradients that are known to fit and to share no memory.
  void use_gradients(const std::vector<Address> &gradients) {
    refuse_another_thread();
    auto layer = batch_->layers.begin();
    for (Address gradient : gradients)
      layer++->gradient = pointer(gradient);
  }

  void measure(const Options &options, Address stats, int threads) {
    alone([&] { batch_->measure(options, table(stats), threads); });
  }

  void step(const Options &options, Address stats, int threads, bool update_norms) {
    alone([&] { batch_->step(options, table(stats), threads, update_norms); });
    for (Layer &layer : batch_->layers)
      layer.buffer = layer.new_buffer;
  }

  void scale(const Options &options, Address stats, int threads) {
    alone([&] { batch_->scale(options, table(stats), threads); });
  }

private:
  // Whether another thread is inside, which has released the interpreter's lock. What it
  // did when this process was forked has ended.
  bool in_use() const { return used_ && used_in_ == forks(); }

  void refuse_another_thread() const {
    if (in_use())
      throw std::runtime_error("another thread is using these arrays: step them from "
                               "one thread at a time");
  }

  template <class F> void alone(F f) {
    refuse_another_thread();
    struct Use {
      Use(bool &used) : used(used) { used = true; }
      ~Use() { used = false; }
      bool &used;
    } use{used_};
    used_in_ = forks();
    without_lock(f);
  }

  static void *pointer(Address address) { return reinterpret_cast<void *>(address); }
  static Stats *table(Address stats) { return static_cast<Stats *>(pointer(stats)); }

  void index_written() {
    written_.clear();
    for (const Layer &layer : batch_->layers) {
      write(layer.result, layer.size * (scales_ ? gradient_bytes_ : bytes_));
      write(layer.new_buffer, layer.size * bytes_);
    }
    std::sort(written_.begin(), written_.end());
    collides_ = false;
    for (std::size_t i = 1; i < written_.size(); ++i)
      collides_ |= written_[i - 1].last > written_[i].first;
    for (const Layer &layer : batch_->layers) {
      const std::int64_t size = layer.size * bytes_;
      collides_ |= (scales_ || layer.weights != layer.result) && hit(layer.weights, size);
      collides_ |= layer.buffer != layer.new_buffer && hit(layer.buffer, size);
    }
  }

  void write(const void *x, std::int64_t size) {
    const auto first = reinterpret_cast<Address>(x);
    if (x && size)
      written_.push_back({first, first + size});
  }

  // Whether something is written over `size` bytes from `x`.
  bool hit(const void *x, std::int64_t size) const {
    const auto first = reinterpret_cast<Address>(x);
    const auto after =
        std::lower_bound(written_.begin(), written_.end(), Span{first + size, 0});
    return x && size && after != written_.begin() && std::prev(after)->last > first;
  }

  std::unique_ptr<Batch> batch_;
  std::int64_t bytes_, gradient_bytes_; // of one element
  bool scales_, scales_in_place_, collides_ = false, fits_ = true;
  bool used_ = false;
  unsigned used_in_ = 0;
  std::vector<Span> written_; // sorted
  const Exchange *exchange_ = nullptr;
  std::vector<Snapshot> fixed_, gradients_;
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

bool dtype_of(const Py_buffer &x, Dtype &out) {
  const std::string format = x.format;
  if (format != "f" && format != "d" && format != "e")
    return false;
  out = format == "f"   ? Dtype::float32
        : format == "d" ? Dtype::float64
                        : Dtype::float16;
  return true;
}

// Scale a gradient in place, if the two are contiguous arrays of one dtype that the buffer
// protocol gives access to.
bool scale_array(const Options &options, nb::handle weights, nb::handle gradient,
                 int threads) {
  const Borrowed w(weights, 0), g(gradient, PyBUF_WRITABLE);
  Dtype dtype;
  if (!w || !g || !alike(*w, *g) || !apart(*w, *g) || !dtype_of(*w, dtype))
    return false;
  const std::int64_t size = (*w).len / (*w).itemsize;
  Batch batch(dtype, dtype,
              {{(*w).buf, (*g).buf, nullptr, (*g).buf, nullptr, size, true, true, false}},
              false);
  Stats stats{-1, -1, -1, -1, -1};
  without_lock([&] { batch.scale(options, &stats, threads); });
  return true;
}

} // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false); // optimizers live until the interpreter ends
  nb::class_<Options>(m, "Options")
      .def("__init__", [](Options *o, nb::handle config, nb::handle lr) {
        new (o) Options(options_of(config, lr));
      });
  nb::class_<Group>(m, "Group")
      .def(nb::init<nb::str, nb::str, const std::vector<Row> &, bool, bool, bool>())
      .def("collides", &Group::collides)
      .def("snapshot", &Group::snapshot)
      .def("rebind", &Group::rebind)
      .def("use_gradients", &Group::use_gradients)
      .def("measure", &Group::measure)
      .def("step", &Group::step)
      .def("scale", &Group::scale);
  m.def("scale_array", &scale_array);
#define LARSKIT_NAME(type, name) #name,
  m.attr("FIELDS") = std::vector<std::string>{LARSKIT_FIELDS(LARSKIT_NAME)};
#undef LARSKIT_NAME
  m.attr("serial_below") = serial_below;
  m.attr("undivided") = undivided;
  m.def("end", &end);
  m.def("variant", [] {
    return std::string(loops(Dtype::float32, Dtype::float32).name);
  });
}
