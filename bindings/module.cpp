// smartclip_kernels._C: addresses in, launches out. No torch: one build serves every version of it.
//
// A Launch holds one batch's addresses; its methods run one kernel each, without the interpreter's lock. Sizes and
// alignment are checked here; that an address has as many numbers behind it as the sizes say is the caller's promise.
#include <cstdlib>

#include "addresses.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#ifdef SK_CUDA
#include "cuda.h"
#endif

namespace smartclip {
namespace {

std::vector<std::string> isas_here() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i)
    if (kIsas[i].runs_here()) names.push_back(kIsas[i].name);
  return names;
}

// SMARTCLIP_CPU_ISA, else the best that this machine has.
const Isa& chosen_isa() {
  static const Isa& isa = []() -> const Isa& {
    const char* const forced = std::getenv("SMARTCLIP_CPU_ISA");
    for (int i = 0; i < kIsaCount; ++i)
      if (kIsas[i].runs_here() && (!forced || !*forced || forced == std::string(kIsas[i].name))) return kIsas[i];
    std::string names;
    for (const std::string& name : isas_here()) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("SMARTCLIP_CPU_ISA: got '" + std::string(forced) + "', needs one of: " + names);
  }();
  return isa;
}

template <class T>
class Launch {
 public:
  Launch(const std::string& similarity, const std::string& objective, const py::dict& row, const py::dict& column,
         uintptr_t scale, uintptr_t bias, double label_smoothing, uintptr_t parameter_gradient, int threads)
      : kernels_(find(similarity, objective)), threads_(threads) {
    if (!kernels_) refuse("no kernel for " + similarity + " and " + objective);
    if (threads < 1) refuse("threads must be at least 1");
    problem_ = problem_of<T>(row, column, scale, bias, label_smoothing, kernels_->factors);
    problem_.parameter_gradient = pointer<double>(parameter_gradient, "parameter_gradient");
  }

  void statistics(const Box& box, const Addresses& accumulators, int64_t stride) const {
    const Tile<T> tile = tile_of(box, accumulators, stride);
    need(&Side<T>::statistics, "statistics");
    run([&] { kernels_->statistics(problem_, tile, threads_); });
  }

  void loss(const std::vector<double>& shares, bool mean, bool counted, uintptr_t loss, uintptr_t weights) const {
    need(&Side<T>::statistics, "statistics");
    need(&Side<T>::loss, "loss");
    Reduction<T> reduction;
    if (loss) {
      if (shares.size() != (kernels_->both_sides ? 2 : 1)) refuse("needs a share for each side that has losses");
      for (size_t k = 0; k < shares.size(); ++k) reduction.share[k] = shares[k];
      reduction.mean = mean;
      reduction.counted = counted;
      reduction.loss = required<T>(loss, "loss");
      reduction.weight = required<T>(weights, "weights");
    }
    run([&] { kernels_->loss(problem_, reduction); });
  }

  void anchor() const {
    if (kernels_->needs_statistics) need(&Side<T>::statistics, "statistics");
    need(&Side<T>::weight, "weight");
    need(&Side<T>::anchor, "anchor");
    run([&] { kernels_->anchor(problem_); });
  }

  void gradient(const Box& box, const Addresses& accumulators, int64_t stride, const Addresses& out, int64_t out_stride,
                bool statistics) const {
    const Tile<T> tile = tile_of(box, accumulators, stride, out, out_stride);
    need(&Side<T>::anchor, "anchor");
    if (statistics && !problem_.row.statistics) refuse("statistics is null");
    if (!problem_.parameter_gradient) refuse("parameter_gradient is null");
    run([&] { kernels_->gradient(problem_, tile, statistics, threads_); });
  }

  void similarity(const Box& box, const Addresses& accumulators, int64_t stride, uintptr_t out,
                  int64_t out_stride) const {
    const Tile<T> tile = tile_of(box, accumulators, stride, {out}, out_stride);
    run([&] { kernels_->similarity(problem_, tile, threads_); });
  }

  void derivative(const Box& box, const Addresses& accumulators, int64_t stride, uintptr_t grad_sim,
                  const Addresses& out, int64_t out_stride) const {
    const Tile<T> tile = tile_of(box, accumulators, stride, out, out_stride);
    const T* const given = required<const T>(grad_sim, "grad_sim");
    run([&] { kernels_->derivative(problem_, tile, given, threads_); });
  }

  void topk(const Box& box, const Addresses& accumulators, int64_t stride, bool swapped, uintptr_t values,
            uintptr_t indices, int64_t k) const {
    const Tile<T> tile = tile_of(box, accumulators, stride);
    if (k < 1 || k > problem_.column.size) refuse("k is not within the candidates");
    const Best<T> best{required<T>(values, "values"), required<int64_t>(indices, "indices"), k};
    run([&] { kernels_->topk(problem_, tile, swapped, best, threads_); });
  }

  void best_positive(const Box& box, const Addresses& accumulators, int64_t stride, bool swapped, uintptr_t values,
                     uintptr_t indices) const {
    const Tile<T> tile = tile_of(box, accumulators, stride);
    const Best<T> best{required<T>(values, "values"), required<int64_t>(indices, "indices"), 1};
    run([&] { kernels_->best_positive(problem_, tile, swapped, best, threads_); });
  }

  void rank(const Box& box, const Addresses& accumulators, int64_t stride, bool swapped, uintptr_t values,
            uintptr_t indices, uintptr_t ranks) const {
    const Tile<T> tile = tile_of(box, accumulators, stride);
    const Best<T> best{required<T>(values, "values"), required<int64_t>(indices, "indices"), 1};
    int64_t* const out = required<int64_t>(ranks, "ranks");
    run([&] { kernels_->rank(problem_, tile, swapped, best, out, threads_); });
  }

  int anchor_planes() const { return kernels_->anchor_planes; }
  int statistics_planes() const { return kernels_->statistics_planes; }
  bool needs_statistics() const { return kernels_->needs_statistics; }
  bool both_sides() const { return kernels_->both_sides; }

 private:
  static const Kernels<T>* find(const std::string& similarity, const std::string& objective) {
    if constexpr (sizeof(T) == sizeof(float)) return chosen_isa().find_float(similarity, objective);
    if constexpr (sizeof(T) == sizeof(double)) return chosen_isa().find_double(similarity, objective);
  }

  Tile<T> tile_of(const Box& box, const Addresses& accumulators, int64_t stride, const Addresses& out = {},
                  int64_t out_stride = 0) const {
    Tile<T> tile;
    check_box(problem_, box);
    std::tie(tile.row, tile.rows, tile.column, tile.columns) = box;
    if (accumulators.size() != static_cast<size_t>(kernels_->accumulators)) refuse("wrong number of accumulators");
    if (stride < tile.columns || (!out.empty() && out_stride < tile.columns)) refuse("a stride is less than a row");
    if (out.size() > 2) refuse("too many outputs");
    for (size_t k = 0; k < accumulators.size(); ++k)
      tile.accumulator[k] = required<const T>(accumulators[k], "accumulator");
    for (size_t k = 0; k < out.size(); ++k) tile.out[k] = required<T>(out[k], "out");
    tile.accumulator_stride = stride;
    tile.out_stride = out_stride;
    return tile;
  }

  template <class Member>
  void need(Member member, const char* name) const {
    need_both(problem_, kernels_->both_sides, member, name);
  }

  template <class Body>
  static void run(Body body) {
    py::gil_scoped_release release;
    body();
  }

  const Kernels<T>* kernels_;
  Problem<T> problem_;
  int threads_;
};

template <class T>
void define_launch(py::module_& module, const char* name) {
  using L = Launch<T>;
  using py::arg;
  py::class_<L>(module, name)
      .def(py::init<const std::string&, const std::string&, const py::dict&, const py::dict&, uintptr_t, uintptr_t,
                    double, uintptr_t, int>(),
           py::kw_only(), arg("similarity"), arg("objective"), arg("row"), arg("column"), arg("scale"), arg("bias") = 0,
           arg("label_smoothing") = 0.0, arg("parameter_gradient") = 0, arg("threads"))
      .def("statistics", &L::statistics, arg("box"), arg("accumulators"), arg("stride"))
      .def("loss", &L::loss, arg("shares") = std::vector<double>(), arg("mean") = false, arg("counted") = false,
           arg("loss") = 0, arg("weights") = 0)
      .def("anchor", &L::anchor)
      .def("gradient", &L::gradient, arg("box"), arg("accumulators"), arg("stride"), arg("out"), arg("out_stride"),
           arg("statistics"))
      .def("similarity", &L::similarity, arg("box"), arg("accumulators"), arg("stride"), arg("out"), arg("out_stride"))
      .def("derivative", &L::derivative, arg("box"), arg("accumulators"), arg("stride"), arg("grad_sim"), arg("out"),
           arg("out_stride"))
      .def("topk", &L::topk, arg("box"), arg("accumulators"), arg("stride"), arg("swapped"), arg("values"),
           arg("indices"), arg("k"))
      .def("best_positive", &L::best_positive, arg("box"), arg("accumulators"), arg("stride"), arg("swapped"),
           arg("values"), arg("indices"))
      .def("rank", &L::rank, arg("box"), arg("accumulators"), arg("stride"), arg("swapped"), arg("values"),
           arg("indices"), arg("ranks"))
      .def_property_readonly("anchor_planes", &L::anchor_planes)
      .def_property_readonly("statistics_planes", &L::statistics_planes)
      .def_property_readonly("needs_statistics", &L::needs_statistics)
      .def_property_readonly("both_sides", &L::both_sides);
}

}  // namespace
}  // namespace smartclip

PYBIND11_MODULE(_C, module) {
  using namespace smartclip;
  define_launch<float>(module, "LaunchFloat32");
  define_launch<double>(module, "LaunchFloat64");
#ifdef SK_CUDA
  py::module_ device = module.def_submodule("cuda", "The kernels for NVIDIA's GPUs.");
  cuda::define(device);
  device.attr("architectures") = SK_CUDA;
  device.attr("nvcc") = SK_NVCC;
#endif
  module.def(
      "isa", [] { return chosen_isa().name; },
      "The instruction set that the kernels use: SMARTCLIP_CPU_ISA or the best here.");
  module.def("isas", &isas_here, "The instruction sets that were built and that this machine has, the best first.");
  module.def("parallel_runtime", &parallel_runtime, "Path of the OpenMP runtime in use; empty where there is none.");
  std::vector<std::string> built;
  for (int i = 0; i < kIsaCount; ++i) built.push_back(kIsas[i].name);
  module.attr("build") = py::dict(py::arg("version") = SK_VERSION, py::arg("compiler") = SK_COMPILER,
                                  py::arg("isas") = built, py::arg("sanitize") = SK_SANITIZE);
}
