// The table of sm_80 kernels of one element type, SK_ELEMENT, which SK_ELEMENT_NAME names; compiled once for each.
#include "sm80/backward.cuh"
#include "sm80/forward.cuh"
#include "sm80/search.cuh"
#include "vectors.cuh"

namespace smartclip::cuda::sm80 {
namespace {

template <class Similarity>
using ConfigOf = Config<SK_ELEMENT, Similarity::kAccumulators>;

// What the host hands over, completed by the plan.
template <class Parameters>
Parameters planned(Parameters parameters, const Plan& plan) {
  parameters.column_tiles_a_block = plan.column_tiles_a_block;
  parameters.parts = plan.parts;
  return parameters;
}

template <class Shared, class Config>
Shape shape_of(const Plan& plan) {
  return {plan.blocks(), Config::kThreads, sizeof(Shared)};
}

template <class Similarity, class Objective>
void launch_statistics(const Statistics& p, const Plan& plan, Stream stream) {
  using C = ConfigOf<Similarity>;
  launch("statistics", statistics<C, Similarity, Objective>, shape_of<ForwardShared<C, Similarity, Objective>, C>(plan),
         stream, planned(p, plan));
}

template <class Similarity, class Objective>
void launch_gradient(const Gradient& p, const Plan& plan, Stream stream) {
  using C = ConfigOf<Similarity>;
  launch("gradient", gradient<C, Similarity, Objective>, shape_of<BackwardShared<C, Similarity, Objective>, C>(plan),
         stream, planned(p, plan));
}

template <class Similarity>
void launch_derivative(const Derivative& p, const Plan& plan, Stream stream) {
  using C = ConfigOf<Similarity>;
  launch("derivative", derivative<C, Similarity>, shape_of<DerivativeShared<C, Similarity>, C>(plan), stream,
         planned(p, plan));
}

// Null where dL/dsim is dL/daccumulator already.
template <class Similarity>
constexpr auto derivative_launch() -> void (*)(const Derivative&, const Plan&, Stream) {
  if constexpr (Similarity::kFactors)
    return launch_derivative<Similarity>;
  else
    return nullptr;
}

template <class Similarity>
void launch_search(const Search& p, const Plan& plan, Stream stream) {
  using C = ConfigOf<Similarity>;
  launch("search", search<C, Similarity>, shape_of<SearchShared<C, Similarity>, C>(plan), stream, planned(p, plan));
}

template <class Objective>
void launch_gather(const Gather& p, Stream stream) {
  launch("gather", gather<Objective>, {blocks_of(p.count), kVectorThreads}, stream, p);
}

template <class Objective>
void launch_anchors(const Anchors& p, Stream stream) {
  launch("anchors", anchors<Objective>, {blocks_of(p.side.size), kVectorThreads}, stream, p);
}

template <class Similarity, class Objective>
const Kernels kKernels = {
    launch_statistics<Similarity, Objective>,
    launch_gradient<Similarity, Objective>,
    derivative_launch<Similarity>(),
    launch_search<Similarity>,
    launch_gather<Objective>,
    launch_anchors<Objective>,
    plan<ConfigOf<Similarity>>,
    Similarity::kAccumulators,
    Objective::kStatistics,
    Objective::kAnchor,
    Passes<Similarity, ConfigOf<Similarity>::kElementBytes == 2>::kRowOperands,
    Passes<Similarity, ConfigOf<Similarity>::kElementBytes == 2>::kColumnOperands,
    ConfigOf<Similarity>::kElementBytes,
    Similarity::kFactors,
    Passes<Similarity, ConfigOf<Similarity>::kElementBytes == 2>::kLow,
    Objective::kNeedsStatistics,
    Objective::kBothSides,
    {
        {"statistics", ConfigOf<Similarity>::kThreads,
         sizeof(ForwardShared<ConfigOf<Similarity>, Similarity, Objective>)},
        {"gradient", ConfigOf<Similarity>::kThreads,
         sizeof(BackwardShared<ConfigOf<Similarity>, Similarity, Objective>)},
        {"derivative", ConfigOf<Similarity>::kThreads, sizeof(DerivativeShared<ConfigOf<Similarity>, Similarity>)},
        {"search", ConfigOf<Similarity>::kThreads, sizeof(SearchShared<ConfigOf<Similarity>, Similarity>)},
    },
};

template <class Similarity, class... Objective>
const Kernels* find_objective(const std::string& name, List<Objective...>) {
  const Kernels* found = nullptr;
  ((name == Objective::kName ? void(found = &kKernels<Similarity, Objective>) : void()), ...);
  return found;
}

template <class... Similarity>
const Kernels* find_similarity(const std::string& name, const std::string& objective, List<Similarity...>) {
  const Kernels* found = nullptr;
  ((name == Similarity::kName ? void(found = find_objective<Similarity>(objective, device::Objectives())) : void()),
   ...);
  return found;
}

}  // namespace

const Kernels* SK_FIND(const std::string& similarity, const std::string& objective) {
  return find_similarity(similarity, objective, device::Similarities());
}

}  // namespace smartclip::cuda::sm80
