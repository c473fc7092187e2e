// The launches of the CUDA backend: a Launch holds one batch's device addresses; its methods start one kernel each, on
// the stream it was made for, and do not wait. Checked as in module.cpp.
#include "cuda.h"

#include <optional>

#include "cuda/kernels.h"

namespace smartclip::cuda {
namespace {

// A panel's matrices, and the numbers from one row to the next.
using Panel = std::tuple<Addresses, int64_t>;

// Where partial states are, slots, anchors, the first of these, and whether nothing was merged into them before.
using Merge = std::tuple<uintptr_t, int, int, int64_t, bool>;

class Launch {
 public:
  Launch(const std::string& architecture, const std::string& element, const std::string& similarity,
         const std::string& objective, const py::dict& row, const py::dict& column, uintptr_t scale, uintptr_t bias,
         double label_smoothing, int multiprocessors, uintptr_t stream, uintptr_t arrived)
      : kernels_(find(architecture, element, similarity, objective)),
        multiprocessors_(multiprocessors),
        stream_(reinterpret_cast<Stream>(stream)),
        arrived_(pointer<uint32_t>(arrived, "arrived")) {
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

  // `kept`: where the part's products go; no matrices: nowhere.
  void statistics(const Box& box, int depth, const Panel& rows, const Panel& columns, uintptr_t inexact,
                  uintptr_t row_partials, uintptr_t column_partials, const Panel& kept) const {
    Statistics p;
    fill(p, box, depth, rows, columns, inexact);
    p.kept = kept_of(kept, p.tile);
    p.row_partials = required<float>(row_partials, "row_partials");
    p.column_partials = pointer<float>(column_partials, "column_partials");
    if (kernels_->both_sides && !p.column_partials) refuse("column_partials is null");
    run([&] { kernels_->statistics(p, plan_of(p.tile.rows, p.tile.columns), stream_); });
  }

  void gradient(const Box& box, int depth, const Panel& rows, const Panel& columns, uintptr_t inexact, const Panel& out,
                uintptr_t parameters, uintptr_t column_scores, uintptr_t row_partials, const Panel& kept) const {
    Gradient p;
    fill(p, box, depth, rows, columns, inexact);
    p.kept = kept_of(kept, p.tile);
    fill_out(p, out, column_scores);
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
    p.per_column = per_column;
    p.first = first;
    p.out = required<int32_t>(out, "out");
    p.row_stride = row_stride;
    p.column_stride = column_stride;
    p.best = pointer<const int64_t>(best, "best");
    if (p.what == Search::kAhead && !p.best) refuse("best is null");
    run([&] { kernels_->search(p, plan_of(p.tile.rows, p.tile.columns), stream_); });
  }

  // `rows`, `columns`: (states, slots, count, start, first) of a panel. `sums`: 16 bytes for every kVectorThreads
  // anchors of the rows, then of the columns. `loss`: null before the last part. `shares`: of rows and columns in it.
  void gather(const Merge& rows, const std::optional<Merge>& columns, const std::string& reduction, uintptr_t sums,
              uintptr_t loss, uintptr_t weights, const std::pair<double, double>& shares) const {
    Gather p;
    p.row = problem_.row;
    p.row_partials = partials(rows, p.row);
    if (kernels_->both_sides != columns.has_value()) refuse("columns: they are merged where they are anchors");
    if (columns) {
      p.column = problem_.column;
      p.column_partials = partials(*columns, p.column);
    }
    p.scale = problem_.scale;
    p.bias = problem_.bias;
    p.smoothing = problem_.label_smoothing;
    p.sums = pointer<LossSum>(sums, "sums");
    p.loss = pointer<float>(loss, "loss");
    if (p.loss) {
      p.weights = required<float>(weights, "weights");
      p.arrived = arrived_;
      if (!p.sums || !p.arrived) refuse("a loss is made of sums, by the last block to arrive");
      if (reduction != "sum" && reduction != "mean") refuse("no reduction is named " + reduction);
      p.reduction = reduction == "sum" ? Reduction::kSum : Reduction::kMean;
      std::tie(p.shares[0], p.shares[1]) = shares;
    }
    run([&] { kernels_->gather(p, stream_); });
  }

  void anchors(bool uniform, double room, uintptr_t unit, uintptr_t gain) const {
    Anchors p;
    need_both(problem_, kernels_->both_sides, &Side<float>::weight, "weight");
    need_both(problem_, kernels_->both_sides, &Side<float>::anchor, "anchor");
    if (kernels_->needs_statistics) need_both(problem_, kernels_->both_sides, &Side<float>::statistics, "statistics");
    p.row = problem_.row;
    if (kernels_->both_sides) p.column = problem_.column;
    p.uniform = uniform;
    p.unit = pointer<float>(unit, "unit");
    p.room = static_cast<float>(room);
    p.scale = problem_.scale;
    p.bias = problem_.bias;
    p.gain = p.unit && uniform ? required<float>(gain, "gain") : nullptr;
    p.smoothing = problem_.label_smoothing;
    run([&] { kernels_->anchors(p, stream_); });
  }

  void unit(uintptr_t x, int64_t x_size, uintptr_t y, int64_t y_size, double room, uintptr_t out,
            uintptr_t gain) const {
    Unit p;
    p.x[0] = x_size ? required<const float>(x, "x") : nullptr;
    p.x[1] = y_size ? required<const float>(y, "y") : nullptr;
    p.size[0] = x_size;
    p.size[1] = y_size;
    p.room = static_cast<float>(room);
    p.unit = required<float>(out, "unit");
    p.scale = problem_.scale;
    p.gain = pointer<float>(gain, "gain");
    run([&] { unit_of(p, stream_); });
  }

  void parameter_gradient(uintptr_t sums, int64_t count, uintptr_t unit, uintptr_t scale, uintptr_t bias) const {
    ParameterGradient p;
    p.sums = required<const double>(sums, "sums");
    if (count < 1) refuse("no sums");
    p.count = count;
    p.unit = pointer<const float>(unit, "unit");
    p.scale = pointer<float>(scale, "scale");
    p.bias = pointer<float>(bias, "bias");
    run([&] { parameter_gradient_of(p, stream_); });
  }

  int anchor_planes() const { return kernels_->anchor_planes; }
  int statistics_planes() const { return kernels_->statistics_planes; }
  bool needs_statistics() const { return kernels_->needs_statistics; }
  bool both_sides() const { return kernels_->both_sides; }

 private:
  static constexpr int kAlignment = 16;  // of rows, in bytes

  static Partials partials(const Merge& from, const Side<float>& side) {
    Partials p;
    uintptr_t states;
    std::tie(states, p.slots, p.count, p.start, p.first) = from;
    p.states = required<const float>(states, "states");
    if (!side.statistics || !side.loss) refuse("statistics or loss is null");
    if (p.slots < 1 || p.count < 1 || p.start < 0 || p.start + p.count > side.size)
      refuse("the anchors lie outside the side");
    if (p.start % kVectorThreads != 0) refuse("a panel starts in the middle of a block's anchors");
    return p;
  }

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
    p.arrived = arrived_;
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

  Kept kept_of(const Panel& panel, const Tile& tile) const {
    const auto& [matrices, stride] = panel;
    Kept kept;
    if (matrices.empty()) return kept;
    if (!kernels_->keeps) refuse("these kernels keep no products");
    if (matrices.size() != static_cast<size_t>(kernels_->accumulators)) refuse("kept: wrong number of matrices");
    if (stride < tile.columns || stride % 2 != 0) refuse("kept: a stride is less than a row, or odd");
    for (size_t k = 0; k < matrices.size(); ++k) {
      if (matrices[k] % kAlignment != 0) refuse("kept: its rows do not start at multiples of 16 bytes");
      kept.matrix[k] = required<float>(matrices[k], "kept");
    }
    kept.stride = stride;
    return kept;
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
  uint32_t* arrived_;  // a count of blocks, 4 bytes; null where no loss is asked for
};

}  // namespace

void define(py::module_& module) {
  using py::arg;
  module.attr("ANCHORS_A_BLOCK") = kVectorThreads;  // of gather(): for so many there is a sum
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
  module.def(
      "keeps",
      [](const std::string& architecture, const std::string& element, const std::string& similarity,
         const std::string& objective) {
        const Kernels* const kernels = find(architecture, element, similarity, objective);
        return kernels && kernels->keeps;
      },
      arg("architecture"), arg("element"), arg("similarity"), arg("objective"),
      "Whether the products are kept for the backward sweep where they fit.");
  py::class_<Launch>(module, "Launch")
      .def(py::init<const std::string&, const std::string&, const std::string&, const std::string&, const py::dict&,
                    const py::dict&, uintptr_t, uintptr_t, double, int, uintptr_t, uintptr_t>(),
           py::kw_only(), arg("architecture"), arg("element"), arg("similarity"), arg("objective"), arg("row"),
           arg("column"), arg("scale"), arg("bias") = 0, arg("label_smoothing") = 0.0, arg("multiprocessors"),
           arg("stream") = 0, arg("arrived") = 0)
      .def("slots", &Launch::slots, arg("rows"), arg("columns"), arg("search"))
      .def("tiles", &Launch::tiles, arg("rows"), arg("columns"))
      .def("statistics", &Launch::statistics, arg("box"), arg("depth"), arg("rows"), arg("columns"), arg("inexact"),
           arg("row_partials"), arg("column_partials"), arg("kept") = Panel())
      .def("gradient", &Launch::gradient, arg("box"), arg("depth"), arg("rows"), arg("columns"), arg("inexact"),
           arg("out"), arg("parameters"), arg("column_scores"), arg("row_partials"), arg("kept") = Panel())
      .def("derivative", &Launch::derivative)
      .def("search", &Launch::search)
      .def("gather", &Launch::gather, arg("rows"), arg("columns"), arg("reduction") = "none", arg("sums") = 0,
           arg("loss") = 0, arg("weights") = 0, arg("shares") = std::make_pair(0.5, 0.5))
      .def("anchors", &Launch::anchors, arg("uniform"), arg("room"), arg("unit"), arg("gain"))
      .def("unit", &Launch::unit)
      .def("parameter_gradient", &Launch::parameter_gradient)
      .def_property_readonly("anchor_planes", &Launch::anchor_planes)
      .def_property_readonly("statistics_planes", &Launch::statistics_planes)
      .def_property_readonly("needs_statistics", &Launch::needs_statistics)
      .def_property_readonly("both_sides", &Launch::both_sides);
}

}  // namespace smartclip::cuda
