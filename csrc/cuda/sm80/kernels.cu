// The table of sm_80 kernels of one element type, SK_ELEMENT; compiled once for each.
#include "sm80/backward.cuh"
#include "sm80/forward.cuh"
#include "sm80/search.cuh"
#include "table.h"

namespace smartclip::cuda::sm80 {
namespace {

template <class Similarity, class Objective>
struct Of {
  using C = Config<SK_ELEMENT, Similarity::kAccumulators>;
  using Forward = ForwardShared<C, Similarity, Objective>;
  using Backward = BackwardShared<C, Similarity, Objective>;

  template <class Shared, class Parameters>
  static void run(const char* name, void (*kernel)(Parameters), Parameters parameters, const Plan& plan,
                  Stream stream) {
    parameters.tiles_a_walk = plan.tiles_a_walk;
    parameters.parts = plan.parts;
    launch(name, kernel, {plan.blocks, C::kThreads, sizeof(Shared)}, stream, parameters);
  }
  static void launch_statistics(const Statistics& p, const Plan& plan, Stream stream) {
    run<Forward>("statistics", statistics<C, Similarity, Objective>, p, plan, stream);
  }
  static void launch_gradient(const Gradient& p, const Plan& plan, Stream stream) {
    run<Backward>("gradient", gradient<C, Similarity, Objective>, p, plan, stream);
  }
  static void launch_derivative(const Derivative& p, const Plan& plan, Stream stream) {
    run<DerivativeShared<C, Similarity>>("derivative", derivative<C, Similarity>, p, plan, stream);
  }
  static void launch_search(const Search& p, const Plan& plan, Stream stream) {
    run<SearchShared<C, Similarity>>("search", search<C, Similarity>, p, plan, stream);
  }
  static Plan plan(int rows, int columns, int multiprocessors) { return sm80::plan<C>(rows, columns, multiprocessors); }

  static constexpr int kElementBytes = C::kElementBytes;
  static constexpr bool kKeeps = C::kKeeps;
  static constexpr Resources kResources[] = {
      {"statistics", C::kBlockM, C::kThreads, sizeof(Forward)},
      {"gradient", C::kBlockM, C::kThreads, sizeof(Backward)},
      {"derivative", C::kBlockM, C::kThreads, sizeof(DerivativeShared<C, Similarity>)},
      {"search", C::kBlockM, C::kThreads, sizeof(SearchShared<C, Similarity>)},
  };
};

}  // namespace

const Kernels* SK_FIND(const std::string& similarity, const std::string& objective) {
  return find_kernels<Of>(similarity, objective);
}

}  // namespace smartclip::cuda::sm80
