// What the kernels of scores share after the products: a block's tiles, its fragment as scores, sums across its warps.
#pragma once

#include "kernels.h"
#include "tile/layout.h"
#include "tile/pairs.h"
#include "tile/reduce.h"

namespace smartclip::cuda {

// Blocks that run at the same time have different rows and the same columns: those stay in the second cache.
struct Walk {
  int row_tiles, row_tile, part, begin, end;  // tiles of columns from begin to before end

  template <class Config>
  SK_DEVICE static Walk of(const Scores& scores) {
    const int column_tiles = (scores.tile.columns + Config::kBlockM - 1) / Config::kBlockM;
    Walk walk;
    walk.row_tiles = (scores.tile.rows + Config::kBlockN - 1) / Config::kBlockN;
    walk.row_tile = ptx::block_index() % walk.row_tiles;
    walk.part = ptx::block_index() / walk.row_tiles;
    walk.begin = walk.part * scores.tiles_a_walk;
    walk.end = walk.begin + scores.tiles_a_walk;
    if (walk.end > column_tiles) walk.end = column_tiles;
    return walk;
  }
};

// gather() counts the blocks that are done, from 0.
SK_DEVICE void clear_count(const Scores& p) {
  if (p.arrived && ptx::block_index() == 0 && ptx::thread_index() == 0) *p.arrived = 0;
}

// kPlanes numbers of each of a block's lines, brought from planes of `size` numbers; 1 outside of the part.
template <int kPlanes, int kBlock>
SK_DEVICE void bring_lines(const float* planes, int64_t size, int64_t start, int first, int count,
                           float (&shared)[kPlanes][kBlock]) {
  const int thread = ptx::thread_index();
  if (thread >= kBlock) return;
#pragma unroll
  for (int k = 0; k < kPlanes; ++k)
    shared[k][thread] = first + thread < count ? planes[k * size + start + first + thread] : 1.0f;
}

// What the similarity knows of a block's rows and columns, in shared memory: there, a thread needs no register for it.
template <class Config, class Similarity>
struct Factors {
  using F = Fragment<Config>;
  float row[1][Similarity::kFactors ? Config::kBlockN : 1], column[1][Similarity::kFactors ? Config::kBlockM : 1];

  SK_DEVICE void bring_rows(const Scores& p, int first) {
    if constexpr (Similarity::kFactors) bring_lines(p.problem.row.factor, 0, p.tile.row, first, p.tile.rows, row);
  }
  SK_DEVICE void bring_columns(const Scores& p, int first) {
    if constexpr (Similarity::kFactors)
      bring_lines(p.problem.column.factor, 0, p.tile.column, first, p.tile.columns, column);
  }
  SK_DEVICE float of_row(int r) const { return Similarity::kFactors ? row[0][F::row(r)] : 0.0f; }
  SK_DEVICE float of_column(int c) const { return Similarity::kFactors ? column[0][F::column(c)] : 0.0f; }
};

// A pair of the tile: its accumulated products and what they give.
template <class Config, class Similarity>
struct ScoreOf {
  float accumulator[Config::kAccumulators], row, column, sim;

  // `numbers`: a fragment, or one that is parked. `factors`: of_row(r) and of_column(c).
  template <class KnownFactors, class Numbers>
  SK_DEVICE ScoreOf(const KnownFactors& factors, const Numbers& numbers, int r, int c)
      : row(factors.of_row(r)), column(factors.of_column(c)) {
#pragma unroll
    for (int k = 0; k < Config::kAccumulators; ++k) accumulator[k] = numbers.at(k, r, c);
    sim = Similarity::value(accumulator, row, column);
  }

  // From dL/dsim to dL/daccumulator, in place of the products.
  template <class Numbers>
  SK_DEVICE void derive(Numbers& numbers, float grad_sim, int r, int c) const {
    float grad[Config::kAccumulators];
    Similarity::derivative(accumulator, row, column, sim, grad_sim, grad);
#pragma unroll
    for (int k = 0; k < Config::kAccumulators; ++k) numbers.at(k, r, c) = grad[k];
  }
};

// The state of a line of candidates none of which is positive: a thread's row or column, over the lanes that share it.
template <class Objective, class Lanes, int kCount>
SK_DEVICE auto state_of_others(const float (&logit)[kCount], bool smoothing) {
  float shift = 0, total = 0;
  if constexpr (Objective::kShifts) {
    shift = logit[0];
#pragma unroll
    for (int k = 1; k < kCount; ++k) shift = fmaxf(shift, logit[k]);
    shift = Lanes::max(shift);
  }
  typename Objective::template Others<float> others;
  static_assert(kCount <= decltype(others)::kMost, "a sum of so many");
#pragma unroll
  for (int k = 0; k < kCount; ++k) others.add(logit[k], shift);
  const float sum = Lanes::sum(others.sum());
  if (smoothing) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) total += logit[k];
    total = Lanes::sum(total);
  }
  return Objective::template State<float>::of_others(shift, sum, total, float(kCount * Lanes::kCount));
}

}  // namespace smartclip::cuda
