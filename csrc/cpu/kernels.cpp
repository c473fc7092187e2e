// The table of kernels, compiled once for every instruction set.
#include "kernels.h"

#include "loss.h"
#include "retrieval.h"

namespace smartclip::SK_ISA {
namespace {

template <class T, class Similarity, class Objective>
const Kernels<T> kKernels = {
    statistics<T, Similarity, Objective>,
    loss<T, Objective>,
    anchor<T, Objective>,
    gradient<T, Similarity, Objective>,
    similarity<T, Similarity>,
    derivative<T, Similarity>,
    topk<T, Similarity>,
    best_positive<T, Similarity>,
    rank<T, Similarity>,
    Similarity::kAccumulators,
    Objective::kStatistics,
    Objective::kAnchor,
    Similarity::kFactors,
    Objective::kNeedsStatistics,
    Objective::kBothSides,
};

template <class T, class Similarity, class... Objective>
const Kernels<T>* find_objective(const std::string& name, List<Objective...>) {
  const Kernels<T>* found = nullptr;
  ((name == Objective::kName ? void(found = &kKernels<T, Similarity, Objective>) : void()), ...);
  return found;
}

template <class T, class... Similarity>
const Kernels<T>* find_similarity(const std::string& name, const std::string& objective, List<Similarity...>) {
  const Kernels<T>* found = nullptr;
  ((name == Similarity::kName ? void(found = find_objective<T, Similarity>(objective, Objectives())) : void()), ...);
  return found;
}

}  // namespace

template <class T>
const Kernels<T>* find(const std::string& similarity, const std::string& objective) {
  return find_similarity<T>(similarity, objective, Similarities());
}
template const Kernels<float>* find<float>(const std::string&, const std::string&);
template const Kernels<double>* find<double>(const std::string&, const std::string&);

}  // namespace smartclip::SK_ISA
