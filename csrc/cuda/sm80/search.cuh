// Scores themselves, and searches through them, by the keys of tile/keys.h.
#pragma once

#include "ptx/launch.h"
#include "sm80/products.cuh"
#include "tile/keys.h"
#include "tile/scores.h"

namespace smartclip::cuda::sm80 {

template <class Config, class Similarity>
struct SearchShared {
  Factors<Config, Similarity> factors;
  union {
    Stage<Config> stages[Config::kStages];
    int64_t row[Config::kWarpsM][Config::kBlockN];
    int64_t column[Config::kWarpsN][Config::kBlockM];
  };
};

// One number of each anchor of a tile: the largest of its keys (kBestPositive), or how many are better than `best`.
template <bool kPerColumn, class Config, class Similarity, class Keys, class Positive>
SK_DEVICE void store_per_anchor(const Search& p, Place place, SearchShared<Config, Similarity>& shared, Keys key_at,
                                Positive positive_at) {
  using F = Fragment<Config>;
  using AnchorLanes = std::conditional_t<kPerColumn, ColumnLanes, RowLanes>;
  constexpr int kAnchors = kPerColumn ? F::kColumns : F::kRows, kCandidates = kPerColumn ? F::kRows : F::kColumns;
  constexpr int kBlock = kPerColumn ? Config::kBlockM : Config::kBlockN;
  constexpr int kWarps = kPerColumn ? Config::kWarpsN : Config::kWarpsM;
  auto& exchange = [&]() -> auto& {
    if constexpr (kPerColumn)
      return shared.column;
    else
      return shared.row;
  }();
  const int first = kPerColumn ? place.column : place.row, count = kPerColumn ? p.tile.columns : p.tile.rows;
  const bool counting = p.what == Search::kAhead;
#pragma unroll
  for (int a = 0; a < kAnchors; ++a) {
    const int at = kPerColumn ? F::column(a) : F::row(a);
    const int64_t best = counting && first + at < count ? p.best[first + at] : 0;
    long long best_key = kNoKey, ahead = 0;
#pragma unroll
    for (int b = 0; b < kCandidates; ++b) {
      const int r = kPerColumn ? b : a, c = kPerColumn ? a : b;
      const int64_t key = key_at(r, c);  // kNoKey outside
      ahead += key > best;
      if (positive_at(r, c) && key > best_key) best_key = key;
    }
    const int64_t found = counting ? AnchorLanes::sum(ahead) : AnchorLanes::max(best_key);
    const bool writes = kPerColumn ? ptx::lane_index() / 4 == 0 : ptx::lane_index() % 4 == 0;
    if (writes) exchange[kPerColumn ? F::warp_n() : F::warp_m()][at] = found;
  }
  ptx::sync_block();
  const int thread = ptx::thread_index();
  if (thread < kBlock && first + thread < count) {
    int64_t found = exchange[0][thread];
    for (int warp = 1; warp < kWarps; ++warp) {
      const int64_t other = exchange[warp][thread];
      found = counting ? found + other : other > found ? other : found;
    }
    const int slot = kPerColumn ? place.row / Config::kBlockN : place.column / Config::kBlockM;
    const int64_t to = int64_t(slot) * count + first + thread;
    if (counting)
      static_cast<int32_t*>(p.out)[to] = static_cast<int32_t>(found);
    else
      static_cast<int64_t*>(p.out)[to] = found;
  }
}

template <class Config, class Similarity>
SK_KERNEL(Config::kThreads, Config::kBlocks)
search(SK_PARAMETER Search p) {
  using F = Fragment<Config>;
  auto& shared = ptx::shared_storage<SearchShared<Config, Similarity>>();
  const Walk walk = Walk::of<Config>(p);
  shared.factors.bring_rows(p, walk.row_tile * Config::kBlockN);
  for (int column_tile = walk.begin; column_tile < walk.end; ++column_tile) {
    const Place place{walk.row_tile * Config::kBlockN, column_tile * Config::kBlockM};
    F fragment;
    shared.factors.bring_columns(p, place.column);
    products<Config, Similarity>(p.tile, place, shared.stages, fragment);
    const auto sim_at = [&](int r, int c) { return ScoreOf<Config, Similarity>(shared.factors, fragment, r, c).sim; };
    const auto row_at = [&](int r) { return place.row + F::row(r); };
    const auto column_at = [&](int c) { return place.column + F::column(c); };
    const auto inside = [&](int r, int c) { return row_at(r) < p.tile.rows && column_at(c) < p.tile.columns; };
    const auto key_at = [&](int r, int c) {
      const int64_t key = key_of(sim_at(r, c), p.first + (p.per_column ? row_at(r) : column_at(c)));
      return inside(r, c) ? key : kNoKey;
    };
    if (p.what == Search::kSim || p.what == Search::kKeys) {
#pragma unroll
      for (int r = 0; r < F::kRows; ++r)
#pragma unroll
        for (int c = 0; c < F::kColumns; ++c) {
          if (!inside(r, c)) continue;
          const int64_t to = row_at(r) * p.row_stride + column_at(c) * p.column_stride;
          if (p.what == Search::kSim)
            static_cast<float*>(p.out)[to] = sim_at(r, c);
          else
            static_cast<int64_t*>(p.out)[to] = key_at(r, c);
        }
    } else {
      const Side<float>&rows = p.problem.row, &columns = p.problem.column;
      const auto positive_at = [&](int r, int c) {
        return inside(r, c) && rows.id_of(p.tile.row + row_at(r)) == columns.id_of(p.tile.column + column_at(c));
      };
      if (p.per_column)
        store_per_anchor<true>(p, place, shared, key_at, positive_at);
      else
        store_per_anchor<false>(p, place, shared, key_at, positive_at);
    }
    ptx::sync_block();
  }
}

}  // namespace smartclip::cuda::sm80
