// What the scores cost: from logits to statistics, from statistics to losses, and from both to G = dL/dlogit.
//
// V is a number or a pack of numbers, M what comparing two of them gives. An objective has
//   State<V>   what a sweep accumulates of one anchor, in kStatistics numbers: add() a logit, merge() another state
//   loss       of an anchor, from its statistics and target; is_anchor: whether it counts in their mean
//   anchor     from these and a weight (the gradient of the anchor's loss) to the kAnchor numbers that G needs
//   gradient   G of a pair, from its logit and both anchors; it may count for one of them alone
// Nearly all candidates are not positive. Of those a sweep may do many at once:
//   Others<V>  their sum, of at most kMost; with a shift that none of the logits exceeds, where the objective kShifts
//   State::of_others  the state of `count` of them, from that sum
//   G of one = other_slope(logit, shift) * (share(row's anchor, shift) + share(column's)) - even(row's) -
//   even(column's) shift_of   an anchor's own; shares are finite for shifts near it
// and says what a tile loop has to know of it. Adding an objective ends here: no loop names one.
#pragma once

#include "problem.h"

namespace smartclip::SK_ISA {

// InfoNCE: r_i = log sum_j e^{s_ij}, L_i = r_i - (1 - e) mean_{j in P(i)} s_ij - e mean_j s_ij, the same for columns.
// With a tau, debiased: r_i = log(P + g), g = max((O - K tau P / |P(i)|) / (1 - tau), K e^{least}), where P and O are
// the sums of e^s over positives and over the K others.
struct Softmax {
  static constexpr const char* kName = "softmax";
  static constexpr bool kNeedsStatistics = true;
  static constexpr bool kBothSides = true;
  static constexpr bool kShifts = true;
  static constexpr bool kSmooths = true;
  static constexpr int kStatistics = 7;
  static constexpr int kAnchor = 5;

  // Sums of e^{s - max} over positives and over the others are kept apart. Where a lone positive is nearly certain,
  // its probability minus 1 would cancel; minus the others' probability does not.
  template <class V>
  struct State {
    V positives, max, positive_mass, other_mass, total, positive_sum, candidates;

    SK_HOST_DEVICE static State empty() { return {V(0), lowest<V>(), V(0), V(0), V(0), V(0), V(0)}; }
    SK_HOST_DEVICE static State of_others(V shift, V sum, V total, V count) {
      return {V(0), shift, V(0), sum, total, V(0), count};
    }

    // A running maximum with one exponential: whichever of max and logit is smaller is brought to the larger.
    template <class M>
    SK_HOST_DEVICE void add(V logit, M positive, M candidate) {
      const V gap = select(candidate, exp(-abs(logit - max)), V(0));
      const M larger = candidate & (logit > max);
      const V rescale = select(larger, gap, V(1));
      const V mass = select(larger, V(1), gap);
      positive_mass = positive_mass * rescale + select(positive, mass, V(0));
      other_mass = other_mass * rescale + select(positive, V(0), mass);
      max = select(larger, logit, max);
      total += select(candidate, logit, V(0));
      positive_sum += select(positive, logit, V(0));
      positives += select(positive, V(1), V(0));
      candidates += select(candidate, V(1), V(0));
    }

    SK_HOST_DEVICE void merge(const State& other) {
      const V gap = exp(-abs(max - other.max));
      const auto larger = other.max > max;
      const V rescale = select(larger, gap, V(1)), rescale_other = select(larger, V(1), gap);
      positive_mass = positive_mass * rescale + other.positive_mass * rescale_other;
      other_mass = other_mass * rescale + other.other_mass * rescale_other;
      max = select(larger, other.max, max);
      total += other.total;
      positive_sum += other.positive_sum;
      positives += other.positives;
      candidates += other.candidates;
    }
  };

  template <class V>
  struct Others {
    static constexpr int kMost = 1 << 20;
    V mass = V(0);

    SK_HOST_DEVICE void add(V logit, V shift) { mass += exp(logit - shift); }
    SK_HOST_DEVICE V sum() const { return mass; }
  };

  template <class V>
  SK_HOST_DEVICE static auto is_anchor(const State<V>& state) {
    return state.positives != V(0);
  }

  // With a tau, relative to the floor's logit where that is larger, so that g stays finite.
  template <class V>
  SK_HOST_DEVICE static State<V> raised(State<V> state, const Target<V>& target) {
    const auto enough = (target.tau == V(0)) | (target.least <= state.max);
    const V rescale = select(enough, V(1), exp(state.max - target.least));
    state.positive_mass = state.positive_mass * rescale;
    state.other_mass = state.other_mass * rescale;
    state.max = select(enough, state.max, target.least);
    return state;
  }

  // g, relative to max as the masses are, and its derivatives. At a tau of 0: the others' mass, bit by bit.
  template <class V>
  struct Negatives {
    V mass, by_others, by_positives;

    SK_HOST_DEVICE Negatives(const State<V>& state, const Target<V>& target) {
      const V count = state.candidates - state.positives, rest = V(1) - target.tau;
      const V among = count * target.tau / state.positives;
      const V debiased = (state.other_mass - among * state.positive_mass) / rest;
      const V floor = select(count == V(0), V(0), count * exp(target.least - state.max));
      const auto biased = target.tau == V(0), floored = debiased < floor;
      mass = select(biased, state.other_mass, select(floored, floor, debiased));
      by_others = select(biased, V(1), select(floored, V(0), V(1) / rest));
      by_positives = select(biased, V(0), select(floored, V(0), -among / rest));
    }
  };

  // log(1 + negatives / positive) where a lone positive dominates: the general form would round at 1. There, max is
  // subtracted before the logarithm is added: their sum would round at the size of the logits.
  template <class V>
  SK_HOST_DEVICE static V loss(State<V> state, const Target<V>& target) {
    state = raised(state, target);
    const V smoothing = target.smoothing;
    const auto no_anchor = state.positives == V(0);
    const V positives = select(no_anchor, V(1), state.positives);
    const V negatives = Negatives<V>(state, target).mass;
    const V general =
        (state.max - (V(1) - smoothing) * state.positive_sum / positives) + log(state.positive_mass + negatives);
    const V certain = smoothing * state.positive_sum + log1p(negatives / state.positive_mass);
    const auto dominates = (state.positives == V(1)) & (negatives <= state.positive_mass);
    V loss = select(dominates, certain, general);
    loss = loss - select(smoothing == V(0), V(0), smoothing * state.total / state.candidates);
    return select(no_anchor, V(0), loss);
  }

  // max; what multiplies e^{s - max} of others, and of positives; what is added at these; each candidate's share.
  // Of a lone positive P (1 + dg/dP) / (P + g) - 1 is known without cancelling: it is minus what the others' G add up
  // to, or minus g / (P + g) where g is the floor.
  template <class V>
  SK_HOST_DEVICE static void anchor(State<V> state, V weight, const Target<V>& target, V* numbers) {
    state = raised(state, target);
    const V smoothing = target.smoothing;
    const auto no_anchor = state.positives == V(0);
    const auto lone = state.positives == V(1);
    const Negatives<V> negatives(state, target);
    const V sum = state.positive_mass + negatives.mass, factor = weight / sum;
    const V pushed = select(negatives.by_others == V(0), negatives.mass, state.other_mass * negatives.by_others);
    const V certain = smoothing * weight - weight * (pushed / sum);
    const V share = -(V(1) - smoothing) * weight / state.positives;
    numbers[0] = state.max;
    numbers[1] = select(no_anchor, V(0), factor * negatives.by_others);
    numbers[2] = select(no_anchor | lone, V(0), factor * (V(1) + negatives.by_positives));
    numbers[3] = select(no_anchor, V(0), select(lone, certain, share));
    numbers[4] = select(no_anchor, V(0), smoothing * weight / state.candidates);
  }

  // Without tau:
  // u_i e^{s - r_i} + v_j e^{s - c_j} - (1 - e) [positive] (u_i / |P(i)| + v_j / |P(j)|) - e (u_i / M + v_j / N)
  template <class V, class M>
  SK_HOST_DEVICE static V gradient(V logit, const V* row, const V* column, M positive, M for_row, M for_column) {
    return select(for_row, part(logit, row, positive), V(0)) + select(for_column, part(logit, column, positive), V(0));
  }

  template <class V>
  SK_HOST_DEVICE static V shift_of(const V* anchor) {
    return anchor[0];
  }
  template <class V>
  SK_HOST_DEVICE static V other_slope(V logit, V shift) {
    return exp(logit - shift);
  }
  template <class V>
  SK_HOST_DEVICE static V share(const V* anchor, V shift) {
    return exp(shift - anchor[0]) * anchor[1];
  }
  template <class V>
  SK_HOST_DEVICE static V even(const V* anchor) {
    return anchor[4];
  }

 private:
  template <class V, class M>
  SK_HOST_DEVICE static V part(V logit, const V* anchor, M positive) {
    const V probability = exp(logit - anchor[0]) * select(positive, anchor[2], anchor[1]);
    return select(positive, probability + anchor[3], probability) - anchor[4];
  }
};

// SigLIP: L_i = sum_j softplus(-z_ij s_ij), z = +1 for a positive pair, -1 otherwise. Only rows are anchors.
struct Sigmoid {
  static constexpr const char* kName = "sigmoid";
  static constexpr bool kNeedsStatistics = false;
  static constexpr bool kBothSides = false;
  static constexpr bool kShifts = false;
  static constexpr bool kSmooths = false;
  static constexpr int kStatistics = 1;
  static constexpr int kAnchor = 1;

  template <class V>
  struct State {
    V sum;

    SK_HOST_DEVICE static State empty() { return {V(0)}; }
    SK_HOST_DEVICE static State of_others(V, V sum, V, V) { return {sum}; }

    template <class M>
    SK_HOST_DEVICE void add(V logit, M positive, M candidate) {
      sum += select(candidate, softplus(select(positive, -logit, logit)), V(0));
    }

    SK_HOST_DEVICE void merge(const State& other) { sum += other.sum; }
  };

  // softplus(t) = max(t, 0) + log(1 + e^{-|t|}), t = -z s
  template <class V>
  SK_HOST_DEVICE static V softplus(V t) {
    return select(t < V(0), V(0), t) + log1p_unit(exp(-abs(t)));
  }

  // One logarithm for all: of the product of 1 + e^{-|t|}, which is at most 2^kMost. Kept less 1, so that small terms
  // are exact: (1 + p) (1 + e) - 1 = p e + (p + e).
  template <class V>
  struct Others {
    static constexpr int kMost = 120;
    V positive_part = V(0), product = V(0);

    SK_HOST_DEVICE void add(V logit, V) {
      const V e = exp(-abs(logit));
      positive_part += select(logit < V(0), V(0), logit);
      product = product * e + (product + e);
    }
    SK_HOST_DEVICE V sum() const { return positive_part + log1p(product); }
  };

  template <class V>
  SK_HOST_DEVICE static auto is_anchor(const State<V>&) {
    return V(0) == V(0);
  }

  template <class V>
  SK_HOST_DEVICE static V loss(const State<V>& state, const Target<V>&) {
    return state.sum;
  }

  template <class V>
  SK_HOST_DEVICE static void anchor(const State<V>&, V weight, const Target<V>&, V* numbers) {
    numbers[0] = weight;
  }

  // -z sigmoid(t), t = -z s
  template <class V, class M>
  SK_HOST_DEVICE static V gradient(V logit, const V* row, const V*, M positive, M for_row, M) {
    const V slope = other_slope(select(positive, -logit, logit), V(0));
    return select(for_row, select(positive, -slope, slope) * row[0], V(0));
  }

  template <class V>
  SK_HOST_DEVICE static V shift_of(const V*) {
    return V(0);
  }
  // sigmoid(t)
  template <class V>
  SK_HOST_DEVICE static V other_slope(V t, V) {
    const V small = exp(-abs(t));
    return select(t < V(0), small, V(1)) / (V(1) + small);
  }
  template <class V>
  SK_HOST_DEVICE static V share(const V* anchor, V) {
    return anchor[0];
  }
  template <class V>
  SK_HOST_DEVICE static V even(const V*) {
    return V(0);
  }
};

using Objectives = List<Softmax, Sigmoid>;

}  // namespace smartclip::SK_ISA
