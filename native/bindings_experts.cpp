// The store of experts for Python: what fills it, how large it is, what it did.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings.h"
#include "experts/direct_file.h"
#include "experts/fetch.h"
#include "experts/store.h"

using namespace nanobind::literals;

namespace localds {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ExpertRows = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Part = std::tuple<int32_t, int64_t, int64_t>;

// Ctrl-C ends a call that waits for the disk.
void check_signals() {
  const nb::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

void make_store(ExpertStore* self, const std::vector<std::string>& files,
                const std::vector<std::tuple<int64_t, std::vector<Part>>>& layers, int64_t experts,
                int64_t slots, int64_t window, int64_t ahead, int64_t most, int64_t readers) {
  std::vector<StoredLayer> stored;
  for (const auto& [block, parts] : layers) {
    StoredLayer layer{block, {}};
    for (const auto& [file, offset, bytes] : parts)
      layer.parts.push_back({.file = file, .offset = offset, .bytes = bytes});
    stored.push_back(std::move(layer));
  }
  new (self) ExpertStore(files, std::move(stored), {experts, slots, window, ahead, most, readers});
  self->set_poll(check_signals);
}

// What a method of the store says of each key, as an array.
template <class T>
nb::ndarray<nb::numpy, T> of_keys(ExpertStore& store, std::vector<T> (ExpertStore::*method)()) {
  std::vector<T> values;
  {
    const nb::gil_scoped_release release;
    values = (store.*method)();
  }
  auto* copy = new T[values.size()];
  std::copy(values.begin(), values.end(), copy);
  return to_numpy(copy, {values.size()});
}

std::vector<ExpertCall::Use> to_uses(const Keys& experts,
                                     const std::variant<Tokens, int64_t>& tokens) {
  const auto* each = std::get_if<Tokens>(&tokens);
  if (each && each->size() != experts.size()) {
    throw std::invalid_argument("fetch: tokens of " + std::to_string(each->size()) +
                                " experts, but " + std::to_string(experts.size()) + " experts");
  }
  std::vector<ExpertCall::Use> uses;
  for (size_t i = 0; i < experts.size(); ++i) {
    uses.push_back({experts.data()[i], each ? each->data()[i] : std::get<int64_t>(tokens)});
  }
  return uses;
}

// Where the outs lie, after a look at their shapes.
std::vector<uint8_t*> to_pointers(const std::vector<ExpertRows>& outs,
                                  const std::vector<ExpertPart>& parts, size_t experts) {
  if (outs.size() != parts.size()) {
    throw std::invalid_argument("fetch: " + std::to_string(outs.size()) + " outs for " +
                                std::to_string(parts.size()) + " parts");
  }
  const auto shape = [](size_t rows, size_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
  };
  std::vector<uint8_t*> pointers;
  for (size_t p = 0; p < outs.size(); ++p) {
    const auto bytes = static_cast<size_t>(parts[p].bytes);
    if (outs[p].shape(0) != experts || outs[p].shape(1) != bytes) {
      throw std::invalid_argument("fetch: out " + std::to_string(p) + " has shape " +
                                  shape(outs[p].shape(0), outs[p].shape(1)) + ", expected " +
                                  shape(experts, bytes));
    }
    pointers.push_back(outs[p].data());
  }
  return pointers;
}

void fetch_experts(ExpertStore& store, int64_t layer, Keys experts,
                   const std::vector<ExpertRows>& outs,
                   const std::variant<Tokens, int64_t>& tokens) {
  const std::vector<uint8_t*> to = to_pointers(outs, store.layer(layer).parts, experts.size());
  const std::vector<ExpertCall::Use> uses = to_uses(experts, tokens);
  const nb::gil_scoped_release release;
  fetch(store, layer, uses, to);
}

void read_file(const DirectFile& file, int64_t start, Bytes out) {
  const auto address = reinterpret_cast<uintptr_t>(out.data());
  constexpr auto kAlignment = DirectFile::kAlignment;
  const auto bytes = static_cast<int64_t>(out.size());
  if (start % kAlignment || bytes % kAlignment || address % kAlignment) {
    throw std::invalid_argument("read: position, size and memory must be multiples of " +
                                std::to_string(kAlignment));
  }
  const nb::gil_scoped_release release;
  file.read(start, bytes, out.data(), "weights");
}

}  // namespace

void bind_experts(nb::module_& m) {
  nb::exception<ReadError>(m, "ReadError", PyExc_OSError);
  nb::class_<DirectFile>(m, "DirectFile")
      .def(nb::init<std::string>(), "path"_a)
      .def_prop_ro("size", &DirectFile::size)
      .def("read", read_file, "start"_a, "out"_a.noconvert());
  nb::class_<StoreStats>(m, "StoreStats")
      .def_ro("uses", &StoreStats::uses)
      .def_ro("hits", &StoreStats::hits)
      .def_ro("early", &StoreStats::early)
      .def_ro("read_bytes", &StoreStats::read_bytes)
      .def_ro("wasted_bytes", &StoreStats::wasted_bytes)
      .def_ro("stall_seconds", &StoreStats::stall_seconds)
      .def_ro("read_seconds", &StoreStats::read_seconds);
  nb::class_<ExpertStore>(m, "ExpertStore")
      .def("__init__", make_store, "files"_a, "layers"_a, "experts"_a, "slots"_a, "window"_a,
           "ahead"_a, "most"_a, "readers"_a)
      .def_prop_ro("slots", &ExpertStore::slots, nb::call_guard<nb::gil_scoped_release>())
      .def("resize", &ExpertStore::resize, "slots"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("set_look_ahead", &ExpertStore::set_look_ahead, "on"_a)
      .def(
          "warm", [](ExpertStore& store, Keys keys) { store.warm({keys.data(), keys.size()}); },
          "keys"_a)
      .def("is_warm", &ExpertStore::is_warm)
      .def("counts", [](ExpertStore& store) { return of_keys(store, &ExpertStore::counts); })
      .def(
          "restore",
          [](ExpertStore& store, Counts counts) { store.restore({counts.data(), counts.size()}); },
          "counts"_a)
      .def("resident", [](ExpertStore& store) { return of_keys(store, &ExpertStore::resident); })
      .def("fetch", fetch_experts, "layer"_a, "experts"_a.noconvert(), "outs"_a.noconvert(),
           "tokens"_a)
      .def("stats", &ExpertStore::stats, nb::call_guard<nb::gil_scoped_release>())
      .def("take_stats", &ExpertStore::take_stats);
}

}  // namespace localds
