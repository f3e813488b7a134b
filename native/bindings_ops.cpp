// The fused operations for Python: one class per layer, one call per forward, without the GIL.
//
// Layers point into their matrices' buffers, which `keep_alive` holds. x is updated in place, so
// arrays are never converted here.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "gqa.h"
#include "head.h"
#include "mla.h"
#include "moe.h"
#include "recorder.h"
#include "scratch.h"
#include "thread_pool.h"

using namespace nanobind::literals;

namespace localds {
namespace {

using Hidden = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ChosenIds = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using TokenIds = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CacheData = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::vector<float> to_vector(const FloatRow& row) { return {row.data(), row.data() + row.size()}; }

std::optional<Matrix> to_matrix(const BoundMatrix* bound) {
  return bound ? std::optional(bound->matrix) : std::nullopt;
}

// The number of rows of x, after a look at its shape.
template <class Array>
int64_t check_rows(const char* operation, const char* what, const Array& x, int64_t width) {
  if (static_cast<int64_t>(x.shape(1)) != width) {
    throw std::invalid_argument(std::string(operation) + ": " + what + " has rows of " +
                                std::to_string(x.shape(1)) + " values, expected " +
                                std::to_string(width));
  }
  return static_cast<int64_t>(x.shape(0));
}

void check_same(const char* operation, int64_t rows, size_t other) {
  if (rows == static_cast<int64_t>(other)) return;
  throw std::invalid_argument(std::string(operation) + ": " + std::to_string(rows) +
                              " input rows, but " + std::to_string(other) + " output rows");
}

CacheRows to_cache(const CacheData& data, uint32_t type, int64_t width) {
  return {data.data(), static_cast<int64_t>(data.shape(0)), static_cast<int64_t>(data.shape(1)),
          static_cast<Type>(type), width};
}

template <class Layer>
void attention_forward(const Layer& layer, Hidden x, CacheData cache, uint32_t cache_type,
                       int64_t cache_width, int64_t past, Recorder* recorder) {
  const int64_t n = check_rows("attention", "x", x, layer.hidden());
  const nb::gil_scoped_release release;
  layer.forward(x.data(), n, to_cache(cache, cache_type, cache_width), past, recorder);
}

template <class Layer>
void feed_forward(const Layer& layer, Hidden x, Recorder* recorder) {
  const int64_t n = check_rows("feed-forward", "x", x, layer.hidden());
  const nb::gil_scoped_release release;
  layer.forward(x.data(), n, recorder);
}

void make_mla(MlaLayer* self, FloatRow norm, const BoundMatrix* q_a, std::optional<FloatRow> q_norm,
              const BoundMatrix& q, const BoundMatrix& kv_a, FloatRow kv_norm,
              const BoundMatrix& k_b, const BoundMatrix& v_b, const BoundMatrix& output,
              FloatRow inverse_frequencies, float amplitude, float softmax_scale, float eps,
              float latent_eps) {
  MlaWeights weights{
      {to_vector(norm), eps},           to_matrix(q_a), std::nullopt, q.matrix,     kv_a.matrix,
      {to_vector(kv_norm), latent_eps}, k_b.matrix,     v_b.matrix,   output.matrix};
  if (q_norm) weights.q_norm = Norm{to_vector(*q_norm), latent_eps};
  new (self)
      MlaLayer(std::move(weights), {to_vector(inverse_frequencies), amplitude}, softmax_scale);
}

void make_gqa(GqaLayer* self, FloatRow norm, const BoundMatrix& q, const BoundMatrix& k,
              const BoundMatrix& v, const BoundMatrix& output, int64_t heads, int64_t kv_heads,
              FloatRow inverse_frequencies, float amplitude, float softmax_scale, float eps) {
  new (self) GqaLayer({{to_vector(norm), eps}, q.matrix, k.matrix, v.matrix, output.matrix},
                      {to_vector(inverse_frequencies), amplitude}, heads, kv_heads, softmax_scale);
}

void make_ffn(FfnLayer* self, FloatRow norm, const BoundMatrix& gate, const BoundMatrix& up,
              const BoundMatrix& down, float eps) {
  new (self) FfnLayer({to_vector(norm), eps}, {gate.matrix, up.matrix, down.matrix});
}

Gating to_gating(const std::string& name) {
  if (name == "softmax") return Gating::kSoftmax;
  if (name == "sigmoid") return Gating::kSigmoid;
  if (name == "softmax_selected") return Gating::kSoftmaxSelected;
  throw std::invalid_argument("router: gating '" + name + "' is unknown");
}

GroupScore to_group_score(const std::string& name) {
  if (name == "max") return GroupScore::kMax;
  if (name == "top2_sum") return GroupScore::kTop2Sum;
  throw std::invalid_argument("router: group score '" + name + "' is unknown");
}

void make_router(Router* self, int64_t top_k, const std::string& gating, bool normalize,
                 float scale, int64_t groups, int64_t groups_used, const std::string& group_score,
                 const std::optional<FloatRow>& bias) {
  new (self) Router{0,      top_k,       to_gating(gating),           normalize, scale,
                    groups, groups_used, to_group_score(group_score), {}};
  if (bias) self->bias = to_vector(*bias);
}

void make_moe(MoeLayer* self, FloatRow norm, const BoundMatrix& router_weight, Router router,
              const BoundMatrix& gate, const BoundMatrix& up, const BoundMatrix& down,
              const BoundMatrix* shared_gate, const BoundMatrix* shared_up,
              const BoundMatrix* shared_down, float eps) {
  std::optional<FfnWeights> shared;
  if (shared_gate && shared_up && shared_down) {
    shared = FfnWeights{shared_gate->matrix, shared_up->matrix, shared_down->matrix};
  }
  router.experts = router_weight.matrix.rows;
  new (self) MoeLayer({to_vector(norm), eps}, router_weight.matrix, std::move(router),
                      {gate.matrix, up.matrix, down.matrix}, std::move(shared));
}

void moe_route(const MoeLayer& layer, FloatRows x, Ids ids, Hidden weights) {
  const int64_t n = check_rows("route", "x", x, layer.hidden());
  check_rows("route", "ids", ids, layer.top_k());
  check_rows("route", "weights", weights, layer.top_k());
  check_same("route", n, ids.shape(0));
  check_same("route", n, weights.shape(0));
  const nb::gil_scoped_release release;
  layer.route(x.data(), n, ids.data(), weights.data());
}

void moe_add_rest(const MoeLayer& layer, FloatRows x, ChosenIds ids, FloatRows weights,
                  Hidden out) {
  const int64_t n = check_rows("add_rest", "x", x, layer.hidden());
  check_rows("add_rest", "ids", ids, layer.top_k());
  check_rows("add_rest", "weights", weights, layer.top_k());
  check_rows("add_rest", "out", out, layer.hidden());
  check_same("add_rest", n, ids.shape(0));
  check_same("add_rest", n, weights.shape(0));
  check_same("add_rest", n, out.shape(0));
  const nb::gil_scoped_release release;
  layer.add_rest(x.data(), n, ids.data(), weights.data(), out.data());
}

void moe_set_elsewhere(MoeLayer& layer, Mask mask) {
  const nb::gil_scoped_release release;
  layer.set_elsewhere({mask.data(), mask.size()});
}

nb::ndarray<nb::numpy, uint64_t> moe_uses(const MoeLayer& layer) {
  const auto experts = static_cast<size_t>(layer.experts());
  auto* uses = new uint64_t[experts];
  layer.uses(uses);
  return to_numpy(uses, {experts});
}

void embed_ids(const BoundMatrix& table, TokenIds ids, Hidden out) {
  const int64_t n = check_rows("embedding", "out", out, table.matrix.cols);
  check_same("embedding", n, ids.size());
  const nb::gil_scoped_release release;
  embed(table.matrix, ids.data(), n, out.data());
}

void head_forward(const HeadLayer& layer, FloatRows x, Hidden logits, Recorder* recorder) {
  const int64_t n = check_rows("head", "x", x, layer.hidden());
  check_rows("head", "logits", logits, layer.vocabulary());
  check_same("head", n, logits.shape(0));
  const nb::gil_scoped_release release;
  layer.forward(x.data(), n, logits.data(), recorder);
}

// Views of what the recorder holds, which is never moved: a copy could take gigabytes.
nb::object recorder_sums(nb::handle self, const std::string& name) {
  const Recorder::Sums* sums = nb::cast<const Recorder&>(self).find(name);
  if (!sums) return nb::none();
  const size_t matrices = sums->counts.size();
  const auto columns = static_cast<size_t>(sums->columns);
  return nb::make_tuple(
      nb::ndarray<nb::numpy, const double>(sums->squares.data(), {matrices, columns}, self),
      nb::ndarray<nb::numpy, const int64_t>(sums->counts.data(), {matrices}, self));
}

void bind_attention(nb::module_& m) {
  nb::class_<MlaLayer>(m, "MlaLayer")
      .def("__init__", make_mla, "norm"_a, "q_a"_a.none(), "q_norm"_a.none(), "q"_a, "kv_a"_a,
           "kv_norm"_a, "k_b"_a, "v_b"_a, "output"_a, "inverse_frequencies"_a, "amplitude"_a,
           "softmax_scale"_a, "eps"_a, "latent_eps"_a, nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 8>(),
           nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>())
      .def("forward", attention_forward<MlaLayer>, "x"_a.noconvert(), "cache"_a.noconvert(),
           "cache_type"_a, "cache_width"_a, "past"_a, "recorder"_a.none() = nb::none());
  nb::class_<GqaLayer>(m, "GqaLayer")
      .def("__init__", make_gqa, "norm"_a, "q"_a, "k"_a, "v"_a, "output"_a, "heads"_a, "kv_heads"_a,
           "inverse_frequencies"_a, "amplitude"_a, "softmax_scale"_a, "eps"_a,
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           nb::keep_alive<1, 6>())
      .def("forward", attention_forward<GqaLayer>, "x"_a.noconvert(), "cache"_a.noconvert(),
           "cache_type"_a, "cache_width"_a, "past"_a, "recorder"_a.none() = nb::none());
}

void bind_feed_forward(nb::module_& m) {
  nb::class_<FfnLayer>(m, "FfnLayer")
      .def("__init__", make_ffn, "norm"_a, "gate"_a, "up"_a, "down"_a, "eps"_a,
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>())
      .def("forward", feed_forward<FfnLayer>, "x"_a.noconvert(), "recorder"_a.none() = nb::none());
  nb::class_<Router>(m, "Router")
      .def("__init__", make_router, "top_k"_a, "gating"_a, "normalize"_a, "scale"_a, "groups"_a,
           "groups_used"_a, "group_score"_a, "bias"_a.none());
  nb::class_<MoeLayer>(m, "MoeLayer")
      .def("__init__", make_moe, "norm"_a, "router_weight"_a, "router"_a, "gate"_a, "up"_a,
           "down"_a, "shared_gate"_a.none(), "shared_up"_a.none(), "shared_down"_a.none(), "eps"_a,
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
           nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>(),
           nb::keep_alive<1, 10>())
      .def("forward", feed_forward<MoeLayer>, "x"_a.noconvert(), "recorder"_a.none() = nb::none())
      .def(
          "read_from",
          [](MoeLayer& self, ExpertStore& store, int64_t layer, bool fused) {
            self.read_from({&store, layer, fused});
          },
          "store"_a, "layer"_a, "fused"_a, nb::keep_alive<1, 2>())
      .def("look_ahead_to", &MoeLayer::look_ahead_to, "next"_a, nb::keep_alive<1, 2>())
      .def("route", moe_route, "x"_a.noconvert(), "ids"_a.noconvert(), "weights"_a.noconvert())
      .def("add_rest", moe_add_rest, "x"_a.noconvert(), "ids"_a.noconvert(),
           "weights"_a.noconvert(), "out"_a.noconvert())
      .def("set_elsewhere", moe_set_elsewhere, "mask"_a.noconvert())
      .def("uses", moe_uses);
}

}  // namespace

void bind_ops(nb::module_& m) {
  nb::class_<Recorder>(m, "Recorder").def(nb::init<>()).def("sums", recorder_sums, "name"_a);
  bind_attention(m);
  bind_feed_forward(m);
  nb::class_<HeadLayer>(m, "HeadLayer")
      .def(
          "__init__",
          [](HeadLayer* self, FloatRow norm, const BoundMatrix& output, float eps) {
            new (self) HeadLayer({to_vector(norm), eps}, output.matrix);
          },
          "norm"_a, "output"_a, "eps"_a, nb::keep_alive<1, 3>())
      .def("forward", head_forward, "x"_a.noconvert(), "logits"_a.noconvert(),
           "recorder"_a.none() = nb::none());
  m.def("embed", embed_ids, "table"_a, "ids"_a.noconvert(), "out"_a.noconvert());
  m.def("set_threads", set_threads, "threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("threads", [] { return ThreadPool::instance().size(); });
  m.def("default_threads", default_threads);
}

}  // namespace localds
