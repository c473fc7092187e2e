// What the scores cost: from logits to statistics, from statistics to losses, and from both to G = dL/dlogit.
//
// V is a number or a pack of numbers, M what comparing two of them gives. An objective has
//   State<V>   what a sweep accumulates of one anchor, in kStatistics numbers: add() a logit, merge() another state
//   loss       of an anchor, from its statistics
//   anchor     from an anchor's statistics and weight (the gradient of its loss) to the kAnchor numbers that G needs
//   gradient   G of a pair, from its logit and both anchors
// and says what a tile loop has to know of it. Adding an objective ends here: no loop names one.
#pragma once

#include "problem.h"

namespace smartclip::SK_ISA {

// InfoNCE: r_i = log sum_j e^{s_ij}, L_i = r_i - (1 - e) mean_{j in P(i)} s_ij - e mean_j s_ij, the same for columns.
struct Softmax {
  static constexpr const char* kName = "softmax";
  static constexpr bool kNeedsStatistics = true;
  static constexpr bool kBothSides = true;
  static constexpr int kStatistics = 6;
  static constexpr int kAnchor = 4;

  template <class V>
  struct State {
    V positives, max, sum, total, positive_sum, candidates;

    SK_HOST_DEVICE static State empty() { return {V(0), lowest<V>(), V(0), V(0), V(0), V(0)}; }

    // A running maximum with one exponential: whichever of max and logit is smaller is brought to the larger.
    template <class M>
    SK_HOST_DEVICE void add(V logit, M positive, M candidate) {
      const V gap = select(candidate, exp(-abs(logit - max)), V(0));
      const M larger = candidate & (logit > max);
      sum = select(larger, sum * gap + V(1), sum + gap);
      max = select(larger, logit, max);
      total += select(candidate, logit, V(0));
      positive_sum += select(positive, logit, V(0));
      positives += select(positive, V(1), V(0));
      candidates += select(candidate, V(1), V(0));
    }

    SK_HOST_DEVICE void merge(const State& other) {
      const V gap = exp(-abs(max - other.max));
      const auto larger = other.max > max;
      sum = select(larger, sum * gap + other.sum, sum + other.sum * gap);
      max = select(larger, other.max, max);
      total += other.total;
      positive_sum += other.positive_sum;
      positives += other.positives;
      candidates += other.candidates;
    }
  };

  // max is subtracted before log(sum) is added: their sum would round at the size of the logits.
  template <class V>
  SK_HOST_DEVICE static V loss(const State<V>& state, V smoothing) {
    const auto no_anchor = state.positives == V(0);
    const V positives = select(no_anchor, V(1), state.positives);
    V loss = state.max - (V(1) - smoothing) * state.positive_sum / positives + log(state.sum);
    loss = loss - select(smoothing == V(0), V(0), smoothing * state.total / state.candidates);
    return select(no_anchor, V(0), loss);
  }

  // max, then what multiplies e^{s - max}, a positive's share and a candidate's share.
  template <class V>
  SK_HOST_DEVICE static void anchor(const State<V>& state, V weight, V smoothing, V* numbers) {
    const auto no_anchor = state.positives == V(0);
    numbers[0] = state.max;
    numbers[1] = select(no_anchor, V(0), weight / state.sum);
    numbers[2] = select(no_anchor, V(0), (V(1) - smoothing) * weight / state.positives);
    numbers[3] = select(no_anchor, V(0), smoothing * weight / state.candidates);
  }

  // u_i e^{s - r_i} + v_j e^{s - c_j} - (1 - e) [positive] (u_i / |P(i)| + v_j / |P(j)|) - e (u_i / M + v_j / N)
  template <class V, class M>
  SK_HOST_DEVICE static V gradient(V logit, const V* row, const V* column, M positive, M candidate) {
    const V probability = exp(logit - row[0]) * row[1] + exp(logit - column[0]) * column[1];
    const V target = select(positive, row[2] + column[2], V(0)) + (row[3] + column[3]);
    return select(candidate, probability - target, V(0));
  }
};

// SigLIP: L_i = sum_j softplus(-z_ij s_ij), z = +1 for a positive pair, -1 otherwise. Only rows are anchors.
struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr bool kNeedsStatistics = false;
  static constexpr bool kBothSides = false;
  static constexpr int kStatistics = 1;
  static constexpr int kAnchor = 1;

  template <class V>
  struct State {
    V sum;

    SK_HOST_DEVICE static State empty() { return {V(0)}; }

    // softplus(t) = max(t, 0) + log(1 + e^{-|t|}), t = -z s
    template <class M>
    SK_HOST_DEVICE void add(V logit, M positive, M candidate) {
      const V t = select(positive, -logit, logit);
      sum += select(candidate, select(t < V(0), V(0), t) + log1p_unit(exp(-abs(t))), V(0));
    }

    SK_HOST_DEVICE void merge(const State& other) { sum += other.sum; }
  };

  template <class V>
  SK_HOST_DEVICE static V loss(const State<V>& state, V) {
    return state.sum;
  }

  template <class V>
  SK_HOST_DEVICE static void anchor(const State<V>&, V weight, V, V* numbers) {
    numbers[0] = weight;
  }

  // -z sigmoid(t), t = -z s
  template <class V, class M>
  SK_HOST_DEVICE static V gradient(V logit, const V* row, const V*, M positive, M candidate) {
    const V t = select(positive, -logit, logit);
    const V small = exp(-abs(t));
    const V sigmoid = select(t < V(0), small, V(1)) / (V(1) + small);
    return select(candidate, select(positive, -sigmoid, sigmoid) * row[0], V(0));
  }
};

using Objectives = List<Softmax, Sigmoid>;

}  // namespace smartclip::SK_ISA
