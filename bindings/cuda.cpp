// The launches of the CUDA backend: a Launch holds one batch's device addresses; its methods start one kernel each, on
// the stream it was made for, and do not wait. Checked as in module.cpp.
#include "cuda.h"

#include "cuda/kernels.h"

namespace smartclip::cuda {
namespace {

// A panel's matrices, and the numbers from one row to the next.
using Panel = std::tuple<Addresses, int64_t>;

class Launch {
 public:
  Launch(const std::string& architecture, const std::string& element, const std::string& similarity,
         const std::string& objective, const py::dict& row, const py::dict& column, uintptr_t scale, uintptr_t bias,
         double label_smoothing, int multiprocessors, uintptr_t stream)
      : kernels_(find(architecture, element, similarity, objective)),
        multiprocessors_(multiprocessors),
        stream_(reinterpret_cast<Stream>(stream)) {
    if (!kernels_) refuse("no kernel for " + architecture + ", " + element + ", " + similarity + " and " + objective);
    if (multiprocessors < 1) refuse("multiprocessors must be at least 1");
    problem_ = problem_of<float>(row, column, scale, bias, label_smoothing, kernels_->factors);
  }

  // How many results a kernel leaves of each row, of each column, and of all scores.
  std::tuple<int64_t, int64_t, int64_t> slots(int rows, int columns, bool search) const {
    const Plan plan = plan_of(rows, columns);
    const Slots& slots = search ? plan.search_slots : plan.slots;
    return {slots.of_rows, slots.of_columns, slots.of_all};
  }

  // Tiles of rows and of columns.
  std::tuple<int, int> tiles(int rows, int columns) const {
    const Plan plan = plan_of(rows, columns);
    return {plan.row_tiles, plan.column_tiles};
  }

  void statistics(const Box& box, int depth, const Panel& rows, const Panel& columns, uintptr_t inexact,
                  uintptr_t row_partials, uintptr_t column_partials) const {
    Statistics p;
    fill(p, box, depth, rows, columns, inexact);
    need_ids(problem_);
    p.row_partials = required<float>(row_partials, "row_partials");
    p.column_partials = pointer<float>(column_partials, "column_partials");
    if (kernels_->both_sides && !p.column_partials) refuse("column_partials is null");
    run([&] { kernels_->statistics(p, plan_of(p.tile.rows, p.tile.columns), stream_); });
  }

  void gradient(const Box& box, int depth, const Panel& rows, const Panel& columns, uintptr_t inexact, const Panel& out,
                uintptr_t parameters, uintptr_t column_scores, uintptr_t row_partials) const {
    Gradient p;
    fill(p, box, depth, rows, columns, inexact);
    fill_out(p, out, column_scores);
    need_ids(problem_);
    need_both(problem_, kernels_->both_sides, &Side<float>::anchor, "anchor");
    p.parameters = required<double>(parameters, "parameters");
    p.row_partials = pointer<float>(row_partials, "row_partials");
    if (p.row_partials && kernels_->needs_statistics) refuse("row_partials: statistics come before this objective's G");
    run([&] { kernels_->gradient(p, plan_of(p.tile.rows, p.tile.columns), stream_); });
  }

  void derivative(const Box& box, int depth, const Panel& rows, const Panel& columns, uintptr_t inexact,
                  uintptr_t grad_sim, uintptr_t unit, const Panel& out, uintptr_t column_scores) const {
    if (!kernels_->derivative) refuse("dL/dsim is what this similarity's products need already");
    Derivative p;
    fill(p, box, depth, rows, columns, inexact);
    fill_out(p, out, column_scores);
    p.grad_sim = required<const float>(grad_sim, "grad_sim");
    p.unit = pointer<const float>(unit, "unit");
    run([&] { kernels_->derivative(p, plan_of(p.tile.rows, p.tile.columns), stream_); });
  }

  void search(const Box& box, int depth, const Panel& rows, const Panel& columns, uintptr_t inexact,
              const std::string& what, bool per_column, int64_t first, uintptr_t out, int64_t row_stride,
              int64_t column_stride, uintptr_t best) const {
    Search p;
    fill(p, box, depth, rows, columns, inexact);
    const char* const names[] = {"sim", "keys", "positive", "ahead"};
    int which = 0;
    while (which < 4 && what != names[which]) ++which;
    if (which == 4) refuse("nothing is searched for by the name of " + what);
    p.what = static_cast<Search::What>(which);
    if (p.what == Search::kBestPositive) need_ids(problem_);
    p.per_column = per_column;
    p.first = first;
    p.out = required<int32_t>(out, "out");
    p.row_stride = row_stride;
    p.column_stride = column_stride;
    p.best = pointer<const int64_t>(best, "best");
    if (p.what == Search::kAhead && !p.best) refuse("best is null");
    run([&] { kernels_->search(p, plan_of(p.tile.rows, p.tile.columns), stream_); });
  }

  void gather(bool column, uintptr_t partials, int blocks, int count, int64_t start, bool first) const {
    Gather p;
    p.side = column ? problem_.column : problem_.row;
    if (!p.side.statistics || !p.side.loss) refuse("statistics or loss is null");
    if (blocks < 1 || count < 1 || start < 0 || start + count > p.side.size) refuse("the anchors lie outside the side");
    p.partials = required<const float>(partials, "partials");
    p.blocks = blocks;
    p.count = count;
    p.start = start;
    p.first = first;
    p.smoothing = problem_.label_smoothing;
    run([&] { kernels_->gather(p, stream_); });
  }

  void anchors(bool column, uintptr_t unit) const {
    Anchors p;
    p.side = column ? problem_.column : problem_.row;
    if (!p.side.weight || !p.side.anchor) refuse("weight or anchor is null");
    if (kernels_->needs_statistics && !p.side.statistics) refuse("statistics is null");
    p.unit = pointer<const float>(unit, "unit");
    p.smoothing = problem_.label_smoothing;
    run([&] { kernels_->anchors(p, stream_); });
  }

  void unit(uintptr_t x, int64_t x_size, uintptr_t y, int64_t y_size, double room, uintptr_t out) const {
    Unit p;
    p.x[0] = x_size ? required<const float>(x, "x") : nullptr;
    p.x[1] = y_size ? required<const float>(y, "y") : nullptr;
    p.size[0] = x_size;
    p.size[1] = y_size;
    p.room = static_cast<float>(room);
    p.unit = required<float>(out, "unit");
    run([&] { unit_of(p, stream_); });
  }

  int anchor_planes() const { return kernels_->anchor_planes; }
  int statistics_planes() const { return kernels_->statistics_planes; }
  bool needs_statistics() const { return kernels_->needs_statistics; }
  bool both_sides() const { return kernels_->both_sides; }

 private:
  static constexpr int kAlignment = 16;  // of rows, in bytes

  Plan plan_of(int rows, int columns) const { return kernels_->plan(rows, columns, multiprocessors_); }

  const void* matrix(uintptr_t address, int64_t stride, const char* name) const {
    if (address == 0) refuse(std::string(name) + " is null");
    if (address % kAlignment != 0 || stride * kernels_->element_bytes % kAlignment != 0)
      refuse(std::string(name) + ": its rows do not start at multiples of 16 bytes");
    return reinterpret_cast<const void*>(address);
  }

  Operands operands(const Panel& panel, int count, int depth, const char* name) const {
    const auto& [matrices, stride] = panel;
    if (matrices.size() != static_cast<size_t>(count)) refuse(std::string(name) + ": wrong number of operands");
    if (stride < depth) refuse(std::string(name) + ": a stride is less than a row");
    Operands operands;
    for (int k = 0; k < count; ++k) operands.matrix[k] = matrix(matrices[k], stride, name);
    operands.stride = stride;
    return operands;
  }

  void fill(Scores& p, const Box& box, int depth, const Panel& rows, const Panel& columns, uintptr_t inexact) const {
    check_box(problem_, box);
    const auto [row, row_count, column, column_count] = box;
    constexpr int64_t kMost = int64_t(1) << 30;
    if (row_count > kMost || column_count > kMost) refuse("a tile of more than 2^30 rows or columns");
    if (depth < 1) refuse("depth must be at least 1");
    p.problem = problem_;
    p.tile.row = row;
    p.tile.rows = static_cast<int>(row_count);
    p.tile.column = column;
    p.tile.columns = static_cast<int>(column_count);
    p.tile.depth = depth;
    p.tile.row_operands = operands(rows, kernels_->row_operands, depth, "row operands");
    p.tile.column_operands = operands(columns, kernels_->column_operands, depth, "column operands");
    p.tile.inexact = pointer<const int32_t>(inexact, "inexact");
    if (kernels_->low_halves && !p.tile.inexact) refuse("inexact is null");
  }

  void fill_out(Derivative& p, const Panel& out, uintptr_t column_scores) const {
    const auto& [matrices, stride] = out;
    if (matrices.size() != static_cast<size_t>(kernels_->accumulators)) refuse("out: wrong number of matrices");
    if (stride < p.tile.columns) refuse("out: a stride is less than a row");
    for (size_t k = 0; k < matrices.size(); ++k) p.out[k] = const_cast<void*>(matrix(matrices[k], stride, "out"));
    p.out_stride = stride;
    p.column_scores = pointer<float>(column_scores, "column_scores");
  }

  template <class Body>
  static void run(Body body) {
    py::gil_scoped_release release;
    body();
  }

  const Kernels* kernels_;
  Problem<float> problem_;
  int multiprocessors_;
  Stream stream_;
};

}  // namespace

void define(py::module_& module) {
  using py::arg;
  module.def(
      "resources",
      [](const std::string& architecture, const std::string& element, const std::string& similarity,
         const std::string& objective) {
        std::vector<std::tuple<std::string, int, int, size_t>> of;
        if (const Kernels* const kernels = find(architecture, element, similarity, objective))
          for (int k = 0; k < kernels->resources_count; ++k) {
            const Resources& r = kernels->resources[k];
            of.emplace_back(r.kernel, r.columns, r.threads, r.shared_bytes);
          }
        return of;
      },
      arg("architecture"), arg("element"), arg("similarity"), arg("objective"),
      "Kernel, columns of its tile, threads and bytes of shared memory of a block; empty where there is no kernel.");
  py::class_<Launch>(module, "Launch")
      .def(py::init<const std::string&, const std::string&, const std::string&, const std::string&, const py::dict&,
                    const py::dict&, uintptr_t, uintptr_t, double, int, uintptr_t>(),
           py::kw_only(), arg("architecture"), arg("element"), arg("similarity"), arg("objective"), arg("row"),
           arg("column"), arg("scale"), arg("bias") = 0, arg("label_smoothing") = 0.0, arg("multiprocessors"),
           arg("stream") = 0)
      .def("slots", &Launch::slots, arg("rows"), arg("columns"), arg("search"))
      .def("tiles", &Launch::tiles, arg("rows"), arg("columns"))
      .def("statistics", &Launch::statistics)
      .def("gradient", &Launch::gradient)
      .def("derivative", &Launch::derivative)
      .def("search", &Launch::search)
      .def("gather", &Launch::gather, arg("column"), arg("partials"), arg("blocks"), arg("count"), arg("start"),
           arg("first"))
      .def("anchors", &Launch::anchors, arg("column"), arg("unit"))
      .def("unit", &Launch::unit)
      .def_property_readonly("anchor_planes", &Launch::anchor_planes)
      .def_property_readonly("statistics_planes", &Launch::statistics_planes)
      .def_property_readonly("needs_statistics", &Launch::needs_statistics)
      .def_property_readonly("both_sides", &Launch::both_sides);
}

}  // namespace smartclip::cuda
