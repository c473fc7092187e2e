// From an architecture's launches to the table of its kernels. `Of<Similarity, Objective>` has launch_statistics,
// launch_gradient, launch_derivative, launch_search, plan, kElementBytes, kKeeps and kResources.
#pragma once

#include "tile/passes.h"
#include "vectors.cuh"

namespace smartclip::cuda {

// Of those that there are: prefixes, which a Cosine is for, come here one by one, normalised.
using Similarities = List<device::Dot, device::MaskedCosine>;

template <class Objective>
void launch_gather(const Gather& p, Stream stream) {
  const int64_t blocks = blocks_of(p.row_partials.count) + blocks_of(p.column_partials.count);
  launch("gather", gather<Objective>, {blocks, kVectorThreads, sizeof(GatherShared)}, stream, p);
}

template <class Objective>
void launch_anchors(const Anchors& p, Stream stream) {
  const int64_t blocks = blocks_of(p.row.size) + blocks_of(p.column.size);
  launch("anchors", anchors<Objective>, {blocks, kVectorThreads}, stream, p);
}

// Null where dL/dsim is dL/daccumulator already.
template <class Of, class Similarity>
constexpr auto derivative_launch() -> void (*)(const Derivative&, const Plan&, Stream) {
  if constexpr (Similarity::kFactors)
    return Of::launch_derivative;
  else
    return nullptr;
}

template <class Of, class Similarity, class Objective>
const Kernels kKernels = {
    Of::launch_statistics,
    Of::launch_gradient,
    derivative_launch<Of, Similarity>(),
    Of::launch_search,
    launch_gather<Objective>,
    launch_anchors<Objective>,
    Of::plan,
    Similarity::kAccumulators,
    Objective::kStatistics,
    Objective::kAnchor,
    Passes<Similarity, Of::kElementBytes == 2>::kRowOperands,
    Passes<Similarity, Of::kElementBytes == 2>::kColumnOperands,
    Of::kElementBytes,
    Similarity::kFactors,
    Passes<Similarity, Of::kElementBytes == 2>::kLow,
    Objective::kNeedsStatistics,
    Objective::kBothSides,
    Of::kKeeps,
    Of::kResources,
    sizeof(Of::kResources) / sizeof(Resources),
};

template <template <class, class> class Of, class Similarity, class... Objective>
const Kernels* find_objective(const std::string& name, List<Objective...>) {
  const Kernels* found = nullptr;
  ((name == Objective::kName ? void(found = &kKernels<Of<Similarity, Objective>, Similarity, Objective>) : void()),
   ...);
  return found;
}

template <template <class, class> class Of, class... Similarity>
const Kernels* find_similarity(const std::string& name, const std::string& objective, List<Similarity...>) {
  const Kernels* found = nullptr;
  ((name == Similarity::kName ? void(found = find_objective<Of, Similarity>(objective, device::Objectives())) : void()),
   ...);
  return found;
}

template <template <class, class> class Of>
const Kernels* find_kernels(const std::string& similarity, const std::string& objective) {
  return find_similarity<Of>(similarity, objective, Similarities());
}

}  // namespace smartclip::cuda
