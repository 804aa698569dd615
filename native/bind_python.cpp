// The Python module: it takes addresses that larskit/engines/native.py has checked.
#include "kernel.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

namespace nb = nanobind;
using namespace larskit;
using Addresses = std::vector<std::uintptr_t>;
using Numbers = std::vector<double>;

namespace {

std::tuple<Numbers, Numbers, Numbers>
run(const Options &options, const Addresses &weights, const Addresses &gradients,
    const Addresses &buffers, const std::vector<bool> &first,
    const std::vector<std::int64_t> &sizes, int threads, const Numbers &w_norms,
    const Numbers &q) {
  std::vector<Layer> layers;
  std::vector<Lengths> known;
  for (std::size_t i = 0; i < weights.size(); ++i)
    layers.push_back({reinterpret_cast<void *>(weights[i]),
                      reinterpret_cast<const void *>(gradients[i]),
                      reinterpret_cast<void *>(buffers[i]), sizes[i], first[i]});
  for (std::size_t i = 0; i < w_norms.size(); ++i)
    known.push_back({w_norms[i], q[i], 0});
  std::vector<Lengths> found;
  {
    nb::gil_scoped_release release;
    found = step(options, layers, threads, known);
  }
  std::tuple<Numbers, Numbers, Numbers> columns;
  for (const Lengths &one : found) {
    std::get<0>(columns).push_back(one.weight);
    std::get<1>(columns).push_back(one.denominator);
    std::get<2>(columns).push_back(one.ratio);
  }
  return columns;
}

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
      .def_rw("has_momentum", &Options::has_momentum)
      .def_rw("lr", &Options::lr)
      .def_rw("momentum", &Options::momentum)
      .def_rw("weight_decay", &Options::weight_decay)
      .def_rw("trust_coefficient", &Options::trust_coefficient)
      .def_rw("eps", &Options::eps)
      .def_rw("dampening", &Options::dampening)
      .def_rw("threshold", &Options::threshold);
  m.def("step", &run);
  m.def("variant", [] { return std::string(loops().name); });
}
