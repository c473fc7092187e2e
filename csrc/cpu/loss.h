// The loops of the losses: statistics forward, G backward.
#pragma once

#include "tile.h"

namespace smartclip::SK_ISA {

// A strip's column states stay in the first cache while the rows of a block pass; a block's sums are short, so that
// float32 loses nothing in them.
constexpr int64_t kStripColumns = 512;
constexpr int64_t kBlockRows = 64;

template <class T>
bool all_count(const Problem<T>& problem) {
  return !problem.row.ignore && !problem.row.ceiling;
}

// An anchor's state, as numbers in planes.
template <class State, class V>
State load_state(const V* numbers) {
  State state;
  static_assert(sizeof(State) % sizeof(V) == 0);
  __builtin_memcpy(&state, numbers, sizeof(State));
  return state;
}

template <class State, class T>
State load_state(const Side<T>& side, int64_t index) {
  constexpr int kPlanes = sizeof(State) / sizeof(T);
  T numbers[kPlanes];
  for (int k = 0; k < kPlanes; ++k) numbers[k] = side.statistics[k * side.size + index];
  return load_state<State>(numbers);
}

template <class State, class T>
void store_state(const Side<T>& side, int64_t index, const State& state) {
  constexpr int kPlanes = sizeof(State) / sizeof(T);
  T numbers[kPlanes];
  __builtin_memcpy(numbers, &state, sizeof(State));
  for (int k = 0; k < kPlanes; ++k) side.statistics[k * side.size + index] = numbers[k];
}

// The lanes of a state of packs merged, in a fixed order.
template <class T, class Objective>
auto fold(typename Objective::template State<Pack<T>> state) {
  constexpr int kPlanes = Objective::kStatistics;
  Pack<T> packs[kPlanes];
  for (int by = Pack<T>::kLanes / 2; by > 0; by /= 2) {
    __builtin_memcpy(packs, &state, sizeof(state));
    for (int k = 0; k < kPlanes; ++k) packs[k] = rotate(packs[k], by);
    state.merge(load_state<decltype(state)>(packs));
  }
  __builtin_memcpy(packs, &state, sizeof(state));
  T numbers[kPlanes];
  for (int k = 0; k < kPlanes; ++k) numbers[k] = packs[k].v[0];
  return load_state<typename Objective::template State<T>>(numbers);
}

// What a strip adds to a row; `start`: it is the row's first.
template <class T, class Objective>
void merge_row(const Side<T>& side, int64_t index, const typename Objective::template State<Pack<T>>& lanes,
               bool start) {
  using State = typename Objective::template State<T>;
  State state = fold<T, Objective>(lanes);
  if (!start) {
    State sum = load_state<State>(side, index);
    sum.merge(state);
    state = sum;
  }
  store_state(side, index, state);
}

template <class T, class Similarity, class Objective, bool kAll>
void statistics_of(const Problem<T>& problem, const Tile<T>& tile, int threads) {
  using V = Pack<T>;
  using State = typename Objective::template State<V>;
  constexpr int64_t kStripPacks = kStripColumns / V::kLanes;
  const V scale(*problem.scale), bias(problem.bias ? *problem.bias : T(0));
  const int parts = parts_of(tile, tile.rows, threads);
  const int64_t packs = (tile.columns + V::kLanes - 1) / V::kLanes;
  Scratch<State> scratch(Objective::kBothSides ? packs * parts : 0);

  for_parts(tile.rows, parts, [&](int part, int64_t begin, int64_t end) {
    State* const columns = scratch.items + packs * part;
    if constexpr (Objective::kBothSides)
      for (int64_t pack = 0; pack < packs; ++pack) columns[pack] = State::empty();
    for (int64_t strip = 0; strip < tile.columns; strip += kStripColumns) {
      const int64_t strip_end = minimum(strip + kStripColumns, tile.columns);
      for (int64_t block = begin; block < end; block += kBlockRows) {
        State block_columns[kStripPacks];
        for (State& state : block_columns) state = State::empty();
        for (int64_t r = block; r < minimum(block + kBlockRows, end); ++r) {
          const Row<T> row(problem.row, tile.row + r);
          State row_state = State::empty();
          for_packs<T>(strip, strip_end, [&](int64_t c, auto count) {
            const Products<T, Similarity> products(problem, tile, row, r, c, count);
            const Pairs<T, kAll> pairs(problem, tile, row, c, count);
            const V logit = scale * products.sim() + bias;
            row_state.add(logit, pairs.positive, pairs.for_row(logit));
            if constexpr (Objective::kBothSides)
              block_columns[(c - strip) / V::kLanes].add(logit, pairs.positive, pairs.for_columns(logit));
          });
          merge_row<T, Objective>(problem.row, tile.row + r, row_state, tile.column + strip == 0);
        }
        if constexpr (Objective::kBothSides)
          for (int64_t c = strip; c < strip_end; c += V::kLanes)
            columns[c / V::kLanes].merge(block_columns[(c - strip) / V::kLanes]);
      }
    }
  });
  if constexpr (Objective::kBothSides) {
    for_parts(packs, parts_of(tile, packs, threads), [&](int, int64_t begin, int64_t end) {
      for (int64_t pack = begin; pack < end; ++pack) {
        const int64_t c = pack * V::kLanes;
        const int count = static_cast<int>(minimum<int64_t>(V::kLanes, tile.columns - c));
        State sum = State::empty();
        V numbers[Objective::kStatistics];
        T* const planes = problem.column.statistics + tile.column + c;
        if (tile.row > 0) {
          for (int k = 0; k < Objective::kStatistics; ++k)
            numbers[k] = V::load(planes + k * problem.column.size, count);
          sum = load_state<State>(numbers);
        }
        for (int part = 0; part < parts; ++part) sum.merge(scratch.items[packs * part + pack]);
        __builtin_memcpy(numbers, &sum, sizeof(sum));
        for (int k = 0; k < Objective::kStatistics; ++k) numbers[k].store(planes + k * problem.column.size, count);
      }
    });
  }
}

template <class T, class Similarity, class Objective>
void statistics(const Problem<T>& problem, const Tile<T>& tile, int threads) {
  const auto run = all_count(problem) ? statistics_of<T, Similarity, Objective, true>
                                      : statistics_of<T, Similarity, Objective, false>;
  run(problem, tile, threads);
}

template <class T, class Objective>
void loss(const Problem<T>& problem, const Reduction<T>& reduction) {
  const Side<T>* const sides[] = {&problem.row, &problem.column};
  double total = 0;
  for (int k = 0; k < (Objective::kBothSides ? 2 : 1); ++k) {
    const Side<T>& side = *sides[k];
    double sum = 0;
    int64_t anchors = 0;
    for (int64_t i = 0; i < side.size; ++i) {
      side.loss[i] =
          Objective::loss(load_state<typename Objective::template State<T>>(side, i), problem.target_of(side, i));
      sum += side.loss[i];
      anchors += !reduction.counted || side.statistics[i] > 0;  // plane 0 counts positives
    }
    if (!reduction.loss) continue;
    const double weight = reduction.share[k] / (reduction.mean ? (anchors > 0 ? anchors : 1) : 1);
    reduction.weight[k] = static_cast<T>(weight);
    // A side without a share is left out: 0 times its infinity would be NaN.
    if (reduction.share[k] != 0) total += weight * sum;
  }
  if (reduction.loss) *reduction.loss = static_cast<T>(total);
}

template <class T, class Objective>
void anchor(const Problem<T>& problem) {
  using State = typename Objective::template State<T>;
  for (const Side<T>* side : {&problem.row, &problem.column}) {
    if (side == &problem.column && !Objective::kBothSides) return;
    for (int64_t i = 0; i < side->size; ++i) {
      const State state = Objective::kNeedsStatistics ? load_state<State>(*side, i) : State::empty();
      T numbers[Objective::kAnchor];
      Objective::anchor(state, side->weight[i], problem.target_of(*side, i), numbers);
      for (int k = 0; k < Objective::kAnchor; ++k) side->anchor[k * side->size + i] = numbers[k];
    }
  }
}

template <class T, class Similarity, class Objective, bool kAll, bool kStatistics>
void gradient_of(const Problem<T>& problem, const Tile<T>& tile, int threads) {
  using V = Pack<T>;
  using State = typename Objective::template State<V>;
  const V scale(*problem.scale), bias(problem.bias ? *problem.bias : T(0));
  const bool column_sums = problem.column.score_gradient;
  const int parts = parts_of(tile, tile.rows, threads);
  const int64_t packs = (tile.columns + V::kLanes - 1) / V::kLanes;
  Scratch<V> scratch(column_sums ? packs * parts : 0);

  for_parts(tile.rows, parts, [&](int part, int64_t begin, int64_t end) {
    V* const columns = scratch.items + packs * part;
    if (column_sums)
      for (int64_t pack = 0; pack < packs; ++pack) columns[pack] = V(T(0));
    for (int64_t strip = 0; strip < tile.columns; strip += kStripColumns) {
      const int64_t strip_end = minimum(strip + kStripColumns, tile.columns);
      for (int64_t r = begin; r < end; ++r) {
        const Row<T> row(problem.row, tile.row + r);
        V row_anchor[Objective::kAnchor];
        for (int k = 0; k < Objective::kAnchor; ++k)
          row_anchor[k] = V(problem.row.anchor[k * problem.row.size + tile.row + r]);
        State row_state = State::empty();
        V sum_scale(T(0)), sum_bias(T(0));
        for_packs<T>(strip, strip_end, [&](int64_t c, auto count) {
          const Products<T, Similarity> products(problem, tile, row, r, c, count);
          const Pairs<T, kAll> pairs(problem, tile, row, c, count);
          const V sim = products.sim();
          const V logit = scale * sim + bias;
          V column_anchor[Objective::kAnchor] = {};
          if constexpr (Objective::kBothSides)
            for (int k = 0; k < Objective::kAnchor; ++k)
              column_anchor[k] = V::load(problem.column.anchor + k * problem.column.size + tile.column + c, count);
          const V grad = Objective::gradient(logit, row_anchor, column_anchor, pairs.positive, pairs.for_row(logit),
                                             pairs.for_columns(logit));
          if constexpr (kStatistics) row_state.add(logit, pairs.positive, pairs.for_row(logit));
          const V grad_sim = grad * sim;
          sum_scale += grad_sim;
          sum_bias += grad;
          if (column_sums) columns[c / V::kLanes] += scale * grad_sim;
          products.store_derivative(tile, sim, scale * grad, r, c, count);
        });
        const bool start = tile.column + strip == 0;
        if constexpr (kStatistics) merge_row<T, Objective>(problem.row, tile.row + r, row_state, start);
        double* const parameters = problem.parameter_gradient + 2 * (tile.row + r);
        if (start) parameters[0] = parameters[1] = 0;
        for (int lane = 0; lane < V::kLanes; ++lane) {
          parameters[0] += sum_scale.v[lane];
          parameters[1] += sum_bias.v[lane];
        }
        if (problem.row.score_gradient)
          problem.row.score_gradient[tile.row + r] = static_cast<T>(parameters[0] * *problem.scale);
      }
    }
  });
  if (column_sums) {
    for (int64_t c = 0; c < tile.columns; ++c) {
      T& sum = problem.column.score_gradient[tile.column + c];
      if (tile.row == 0) sum = 0;
      for (int part = 0; part < parts; ++part) sum += scratch.items[packs * part + c / V::kLanes].v[c % V::kLanes];
    }
  }
}

template <class T, class Similarity, class Objective>
void gradient(const Problem<T>& problem, const Tile<T>& tile, bool statistics, int threads) {
  const bool all = all_count(problem);
  const auto run = statistics ? (all ? gradient_of<T, Similarity, Objective, true, true>
                                     : gradient_of<T, Similarity, Objective, false, true>)
                              : (all ? gradient_of<T, Similarity, Objective, true, false>
                                     : gradient_of<T, Similarity, Objective, false, false>);
  run(problem, tile, threads);
}

}  // namespace smartclip::SK_ISA
