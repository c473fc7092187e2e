// The forward sweep: every score once, reduced at once into the states of its row and its column.
//
// A block owns a tile of rows and keeps their states; of each tile of columns it leaves one state a column in a slot of
// its own. gather() merges the slots in order: no atomics, and the same bits every time.
#pragma once

#include "ptx/launch.h"
#include "sm80/products.cuh"
#include "tile/scores.h"
#include "tile/store.h"
#include "vectors.cuh"

namespace smartclip::cuda::sm80 {

// States of a block's lines, from every warp that has a part of the line. The first warp's of a row goes on from tile
// to tile; a column's are of one tile.
template <class Config, class Objective>
struct Exchange {
  using F = Fragment<Config>;
  using State = typename Objective::template State<float>;
  State row[Config::kWarpsM][Config::kBlockN], column[Objective::kBothSides ? Config::kWarpsN : 1][Config::kBlockM];

  SK_DEVICE void clear() {
    if (ptx::thread_index() < Config::kBlockN) row[0][ptx::thread_index()] = State::empty();
  }
  SK_DEVICE void put_row(int r, const State& state) {
    if (ptx::lane_index() % 4 != 0) return;
    State& slot = row[F::warp_m()][F::row(r)];
    if (F::warp_m() == 0)
      slot.merge(state);
    else
      slot = state;
  }
  SK_DEVICE void put_column(int c, const State& state) {
    if (ptx::lane_index() / 4 == 0) column[F::warp_n()][F::column(c)] = state;
  }
  // After a barrier.
  SK_DEVICE void merge_rows() {
    if (ptx::thread_index() >= Config::kBlockN) return;
    for (int warp = 1; warp < Config::kWarpsM; ++warp)
      row[0][ptx::thread_index()].merge(row[warp][ptx::thread_index()]);
  }
  SK_DEVICE void store_rows(const Scores& p, const Walk& walk, float* partials) const {
    const int index = walk.row_tile * Config::kBlockN + ptx::thread_index();
    if (ptx::thread_index() < Config::kBlockN && index < p.tile.rows)
      store_planes(partials + int64_t(walk.part) * p.tile.rows + index, int64_t(p.parts) * p.tile.rows,
                   row[0][ptx::thread_index()]);
  }
  SK_DEVICE void store_columns(const Scores& p, const Walk& walk, int first, float* partials) const {
    const int index = first + ptx::thread_index();
    if (ptx::thread_index() >= Config::kBlockM || index >= p.tile.columns) return;
    State state = column[0][ptx::thread_index()];
    for (int warp = 1; warp < Config::kWarpsN; ++warp) state.merge(column[warp][ptx::thread_index()]);
    store_planes(partials + int64_t(walk.row_tile) * p.tile.columns + index, int64_t(walk.row_tiles) * p.tile.columns,
                 state);
  }
};

// States of a fragment's rows (and columns, where they are anchors) from its logits.
template <class Config, class Objective, class LogitAt>
SK_DEVICE void put_plain_states(LogitAt logit_at, bool smoothing, Exchange<Config, Objective>& exchange) {
  using F = Fragment<Config>;
#pragma unroll
  for (int r = 0; r < F::kRows; ++r) {
    float line[F::kColumns];
#pragma unroll
    for (int c = 0; c < F::kColumns; ++c) line[c] = logit_at(r, c);
    exchange.put_row(r, state_of_others<Objective, RowLanes>(line, smoothing));
  }
  if constexpr (Objective::kBothSides) {
#pragma unroll
    for (int c = 0; c < F::kColumns; ++c) {
      float line[F::kRows];
#pragma unroll
      for (int r = 0; r < F::kRows; ++r) line[r] = logit_at(r, c);
      exchange.put_column(c, state_of_others<Objective, ColumnLanes>(line, smoothing));
    }
  }
}

// The same where pairs differ, one by one.
template <class Config, class Objective>
SK_DEVICE void put_mixed_states(const Parked<Config>& logits, const MixedPairs<Config>& pairs,
                                Exchange<Config, Objective>& exchange) {
  using F = Fragment<Config>;
  using State = typename Objective::template State<float>;
#pragma unroll 1
  for (int r = 0; r < F::kRows; ++r) {
    State state = State::empty();
#pragma unroll 1
    for (int c = 0; c < F::kColumns; ++c) {
      const float logit = logits.at(0, r, c);
      state.add(logit, pairs.positive(r, c), pairs.for_row(r, c, logit));
    }
    exchange.put_row(r, RowLanes::merged(state));
  }
  if constexpr (Objective::kBothSides) {
#pragma unroll 1
    for (int c = 0; c < F::kColumns; ++c) {
      State state = State::empty();
#pragma unroll 1
      for (int r = 0; r < F::kRows; ++r) {
        const float logit = logits.at(0, r, c);
        state.add(logit, pairs.positive(r, c), pairs.for_column(r, c, logit));
      }
      exchange.put_column(c, ColumnLanes::merged(state));
    }
  }
}

template <class Config, class Objective, class LogitAt>
SK_DEVICE void put_states(const Scores& p, Place place, bool plain, LogitAt logit_at, Parked<Config>& parked,
                          Exchange<Config, Objective>& exchange) {
  if (plain) {
    put_plain_states<Config, Objective>(logit_at, p.problem.label_smoothing != 0, exchange);
  } else {
    for_pairs<Config>([&](int r, int c) { parked.at(0, r, c) = logit_at(r, c); });
    put_mixed_states<Config, Objective>(parked, MixedPairs<Config>(p, place), exchange);
  }
}

template <class Config, class Similarity, class Objective>
struct ForwardShared {
  union {
    Stage<Config> stages[Config::kStages];
    Parked<Config> parked;
  };
  Factors<Config, Similarity> factors;
  Exchange<Config, Objective> exchange;
};

template <class Config, class Similarity, class Objective>
SK_KERNEL(Config::kThreads, Config::kBlocks)
statistics(SK_PARAMETER Statistics p) {
  static_assert(Config::kThreads >= Config::kBlockN && Config::kThreads >= Config::kBlockM, "a thread for every line");
  auto& shared = ptx::shared_storage<ForwardShared<Config, Similarity, Objective>>();
  clear_count(p);
  const Walk walk = Walk::of<Config>(p);
  const float scale = *p.problem.scale, bias = p.problem.bias ? *p.problem.bias : 0.0f;
  shared.exchange.clear();
  shared.factors.bring_rows(p, walk.row_tile * Config::kBlockN);

  for (int column_tile = walk.begin; column_tile < walk.end; ++column_tile) {
    const Place place{walk.row_tile * Config::kBlockN, column_tile * Config::kBlockM};
    Fragment<Config> fragment;
    shared.factors.bring_columns(p, place.column);
    products<Config, Similarity>(p.tile, place, shared.stages, fragment);
    if constexpr (Config::kKeeps) keep(fragment, p, place);
    for_pairs<Config>([&](int r, int c) {
      fragment.at(0, r, c) = scale * ScoreOf<Config, Similarity>(shared.factors, fragment, r, c).sim + bias;
    });
    const auto logit_at = [&](int r, int c) { return fragment.at(0, r, c); };
    put_states<Config, Objective>(p, place, plain_pairs<Config>(p, place, logit_at), logit_at, shared.parked,
                                  shared.exchange);
    ptx::sync_block();
    shared.exchange.merge_rows();
    if constexpr (Objective::kBothSides) shared.exchange.store_columns(p, walk, place.column, p.column_partials);
  }
  shared.exchange.store_rows(p, walk, p.row_partials);
}

}  // namespace smartclip::cuda::sm80
