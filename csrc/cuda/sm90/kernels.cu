// The table of sm_90a kernels of one element type, SK_ELEMENT; compiled once for each.
#include "sm90/backward.cuh"
#include "sm90/derivative.cuh"
#include "sm90/forward.cuh"
#include "sm90/search.cuh"
#include "table.h"

namespace smartclip::cuda::sm90 {
namespace {

// What the host hands over, completed by the plan and the maps of its operands.
template <class Config, class Passes, class Parameters>
Launched<Parameters, Passes> launched(const Parameters& parameters, const Plan& plan) {
  Launched<Parameters, Passes> p;
  static_cast<Parameters&>(p) = parameters;
  p.tiles_a_walk = plan.tiles_a_walk;
  p.parts = plan.parts;
  p.blocks = static_cast<int>(plan.blocks);
  const Tile& tile = p.tile;
  const auto map = [&](const Operands& operands, int k, int rows, int box_rows) {
    return ptx::tensor_map<typename Config::Element>(operands.matrix[k], rows, tile.depth, operands.stride, box_rows);
  };
  for (int k = 0; k < Passes::kRowOperands; ++k) p.row_maps[k] = map(tile.row_operands, k, tile.rows, Config::kBlockN);
  for (int k = 0; k < Passes::kColumnOperands; ++k)
    p.column_maps[k] = map(tile.column_operands, k, tile.columns, Config::kBlockM);
  return p;
}

template <class Config, class Shared, class Passes, class Parameters>
void run(const char* name, void (*kernel)(Launched<Parameters, Passes>), const Parameters& parameters, const Plan& plan,
         Stream stream) {
  launch(name, kernel, {plan.blocks, Config::kThreads, sizeof(Shared)}, stream,
         launched<Config, Passes>(parameters, plan));
}

template <class Similarity, class Objective>
struct Of {
  using Passes = cuda::Passes<Similarity, true>;
  using W = Wide<SK_ELEMENT, Similarity::kAccumulators>;
  using N = Narrow<SK_ELEMENT, Similarity::kAccumulators>;
  template <class C>
  using Forward = ForwardShared<C, Similarity, Objective>;
  template <class C>
  using Backward = BackwardShared<C, Similarity, Objective>;
  template <class C>
  using Given = DerivativeShared<C, Similarity>;
  template <class C>
  using Found = SearchShared<C, Similarity>;

  static void launch_statistics(const Statistics& p, const Plan& plan, Stream stream) {
    if (plan.narrow)
      run<N, Forward<N>>("statistics", statistics<N, Similarity, Objective, Passes>, p, plan, stream);
    else
      run<W, Forward<W>>("statistics", statistics<W, Similarity, Objective, Passes>, p, plan, stream);
  }
  template <class C>
  static void launch_gradient_of(const Gradient& p, const Plan& plan, Stream stream) {
    if constexpr (C::kKeeps)
      if (p.kept.matrix[0])
        return run<C, Backward<C>>("gradient", gradient<C, Similarity, Objective, Passes, true>, p, plan, stream);
    run<C, Backward<C>>("gradient", gradient<C, Similarity, Objective, Passes, false>, p, plan, stream);
  }
  static void launch_gradient(const Gradient& p, const Plan& plan, Stream stream) {
    plan.narrow ? launch_gradient_of<N>(p, plan, stream) : launch_gradient_of<W>(p, plan, stream);
  }
  static void launch_derivative(const Derivative& p, const Plan& plan, Stream stream) {
    if (plan.narrow)
      run<N, Given<N>>("derivative", derivative<N, Similarity, Passes>, p, plan, stream);
    else
      run<W, Given<W>>("derivative", derivative<W, Similarity, Passes>, p, plan, stream);
  }
  static void launch_search(const Search& p, const Plan& plan, Stream stream) {
    if (plan.narrow)
      run<N, Found<N>>("search", search<N, Similarity, Passes>, p, plan, stream);
    else
      run<W, Found<W>>("search", search<W, Similarity, Passes>, p, plan, stream);
  }
  static Plan plan(int rows, int columns, int multiprocessors) {
    return sm90::plan<W, N>(rows, columns, multiprocessors);
  }

  static constexpr int kElementBytes = W::kElementBytes;
  static constexpr bool kKeeps = W::kKeeps;
  static constexpr Resources kResources[] = {
      {"statistics", W::kBlockM, W::kThreads, sizeof(Forward<W>)},
      {"gradient", W::kBlockM, W::kThreads, sizeof(Backward<W>)},
      {"derivative", W::kBlockM, W::kThreads, sizeof(Given<W>)},
      {"search", W::kBlockM, W::kThreads, sizeof(Found<W>)},
      {"statistics", N::kBlockM, N::kThreads, sizeof(Forward<N>)},
      {"gradient", N::kBlockM, N::kThreads, sizeof(Backward<N>)},
      {"derivative", N::kBlockM, N::kThreads, sizeof(Given<N>)},
      {"search", N::kBlockM, N::kThreads, sizeof(Found<N>)},
  };
  template <class C>
  static constexpr bool kFits = sizeof(Forward<C>) <= C::kMostShared && sizeof(Backward<C>) <= C::kMostShared &&
                                sizeof(Given<C>) <= C::kMostShared && sizeof(Found<C>) <= C::kMostShared;
  static_assert(kFits<W> && kFits<N>, "more shared memory than there is");
};

}  // namespace

const Kernels* SK_FIND(const std::string& similarity, const std::string& objective) {
  return find_kernels<Of>(similarity, objective);
}

}  // namespace smartclip::cuda::sm90
