// The backward sweep: every score once more, dL/dscore of it, and from that what the products' gradients are made of.
//
// dL/daccumulator goes to memory in the operands' precision, without the incoming gradient's size, 1/N and scale, which
// half precision could not hold; sums are made of the numbers before they are rounded.
#pragma once

#include "sm80/forward.cuh"

namespace smartclip::cuda::sm80 {

// Sums over the tile's rows of dL/dsim * sim, from every warp that has a part of the column.
template <class Config>
struct ColumnScores {
  using F = Fragment<Config>;
  float sum[Config::kWarpsN][Config::kBlockM];

  // `along` of column c: the thread's own sum.
  SK_DEVICE void put(int c, float along) {
    along = ColumnLanes::sum(along);
    if (ptx::lane_index() / 4 == 0) sum[F::warp_n()][F::column(c)] = along;
  }
  // After a barrier: into the block's slot.
  SK_DEVICE void store(const Derivative& p, Place place) const {
    const int thread = ptx::thread_index(), column = place.column + thread;
    if (!p.column_scores || thread >= Config::kBlockM || column >= p.tile.columns) return;
    float total = 0;
    for (int warp = 0; warp < Config::kWarpsN; ++warp) total += sum[warp][thread];
    p.column_scores[int64_t(place.row / Config::kBlockN) * p.tile.columns + column] = total;
  }
};

// Sums of G * sim and of G, of every thread: in registers they would be in the way of the products.
template <class Config>
struct ParameterSums {
  double along_sim[Config::kThreads], total[Config::kThreads];

  SK_DEVICE void clear() { along_sim[ptx::thread_index()] = total[ptx::thread_index()] = 0; }
  SK_DEVICE void add(float along, float sum) {
    along_sim[ptx::thread_index()] += along;
    total[ptx::thread_index()] += sum;
  }
  // Over the block, in a fixed order.
  SK_DEVICE void store(double* out) {
    ptx::sync_block();
    if (ptx::warp_index() >= 2) return;
    const double* const numbers = ptx::warp_index() == 0 ? along_sim : total;
    double sum = 0;
    for (int k = ptx::lane_index(); k < Config::kThreads; k += ptx::kWarp) sum += numbers[k];
    sum = Lanes<1, ptx::kWarp>::sum(sum);
    if (ptx::lane_index() == 0) out[ptx::warp_index()] = sum;
  }
};

struct Nothing {};

template <class Config, class Similarity, class Objective>
struct BackwardShared {
  union {
    Stage<Config> stages[Config::kStages];
    Parked<Config> parked;
  };
  ParameterSums<Config> parameters;
  Factors<Config, Similarity> factors;
  ColumnScores<Config> scores;
  std::conditional_t<Objective::kNeedsStatistics, Nothing, Exchange<Config, Objective>> exchange;
  float scale, bias;
  float row_anchor[Objective::kAnchor][Config::kBlockN];
  float column_anchor[Objective::kAnchor][Objective::kBothSides ? Config::kBlockM : 1];
};

// G of a tile's pairs from their scores, dL/daccumulator in place of the products, and the sums that G is good for.
template <class Config, class Similarity, class Objective>
class GradientOf {
  using F = Fragment<Config>;
  using Shared = BackwardShared<Config, Similarity, Objective>;

 public:
  SK_DEVICE GradientOf(const Gradient& p, Place place, Shared& shared) : p_(p), place_(place), shared_(shared) {}

  SK_DEVICE void plain(Fragment<Config>& fragment) {
    const PlainPairs pairs;
    Sums sums;
#pragma unroll
    for (int c = 0; c < F::kColumns; ++c) {
      Sums column;
#pragma unroll
      for (int r = 0; r < F::kRows; ++r) add_pair(fragment, pairs, r, c, column);
      finish_column(c, column, sums);
      if constexpr (Config::kReadsAnew) ptx::keep_order();
    }
    shared_.parameters.add(sums.along, sums.total);
  }

  SK_DEVICE void mixed(Parked<Config>& parked) {
    const MixedPairs<Config> pairs(p_, place_);
    Sums sums;
#pragma unroll 1
    for (int c = 0; c < F::kColumns; ++c) {
      Sums column;
#pragma unroll 1
      for (int r = 0; r < F::kRows; ++r) add_pair(parked, pairs, r, c, column);
      finish_column(c, column, sums);
    }
    shared_.parameters.add(sums.along, sums.total);
  }

  SK_DEVICE float logit(const Fragment<Config>& fragment, int r, int c) const {
    return shared_.scale * ScoreOf<Config, Similarity>(shared_.factors, fragment, r, c).sim + shared_.bias;
  }

 private:
  // Of G * sim and of G. Long sums of numbers that are alike would lose digits: columns are summed apart.
  struct Sums {
    float along = 0, total = 0;
  };

  template <class Numbers, class Pairs>
  SK_DEVICE void add_pair(Numbers& numbers, const Pairs& pairs, int r, int c, Sums& column) {
    float u[Objective::kAnchor], v[Objective::kAnchor] = {};
#pragma unroll
    for (int k = 0; k < Objective::kAnchor; ++k) {
      u[k] = shared_.row_anchor[k][F::row(r)];
      if constexpr (Objective::kBothSides) v[k] = shared_.column_anchor[k][F::column(c)];
    }
    const ScoreOf<Config, Similarity> score(shared_.factors, numbers, r, c);
    const float logit = shared_.scale * score.sim + shared_.bias;
    const float grad = Objective::gradient(logit, u, v, pairs.positive(r, c), pairs.for_row(r, c, logit),
                                           pairs.for_column(r, c, logit));
    score.derive(numbers, grad, r, c);
    column.total += grad;
    column.along += grad == 0 ? 0.0f : grad * score.sim;  // not 0 * infinity, where a pair does not count
  }

  SK_DEVICE void finish_column(int c, const Sums& column, Sums& sums) {
    sums.along += column.along;
    sums.total += column.total;
    if (p_.column_scores) shared_.scores.put(c, column.along);
  }

  const Gradient& p_;
  const Place place_;
  Shared& shared_;
};

template <class Config, class Similarity, class Objective>
SK_KERNEL(Config::kThreads, Config::kBlocks)
gradient(SK_PARAMETER Gradient p) {
  auto& shared = ptx::shared_storage<BackwardShared<Config, Similarity, Objective>>();
  clear_count(p);
  const Walk walk = Walk::of<Config>(p);
  const int first_row = walk.row_tile * Config::kBlockN;
  shared.parameters.clear();
  if (ptx::thread_index() == 0) {
    shared.scale = *p.problem.scale;
    shared.bias = p.problem.bias ? *p.problem.bias : 0.0f;
  }
  shared.factors.bring_rows(p, first_row);
  bring_lines(p.problem.row.anchor, p.problem.row.size, p.tile.row, first_row, p.tile.rows, shared.row_anchor);
  if constexpr (!Objective::kNeedsStatistics) shared.exchange.clear();

  for (int column_tile = walk.begin; column_tile < walk.end; ++column_tile) {
    const Place place{first_row, column_tile * Config::kBlockM};
    Fragment<Config> fragment;
    shared.factors.bring_columns(p, place.column);
    if constexpr (Objective::kBothSides)
      bring_lines(p.problem.column.anchor, p.problem.column.size, p.tile.column, place.column, p.tile.columns,
                  shared.column_anchor);
    if (Config::kKeeps && p.kept.matrix[0]) {
      bring_kept(fragment, p, place);
      ptx::sync_block();
    } else {
      products<Config, Similarity>(p.tile, place, shared.stages, fragment);
    }
    GradientOf<Config, Similarity, Objective> gradient(p, place, shared);
    const auto logit_at = [&](int r, int c) { return gradient.logit(fragment, r, c); };
    const bool plain = plain_pairs<Config>(p, place, logit_at);
    if constexpr (!Objective::kNeedsStatistics)
      if (p.row_partials) put_states<Config, Objective>(p, place, plain, logit_at, shared.parked, shared.exchange);
    if (plain) {
      gradient.plain(fragment);
    } else {
      park(fragment, shared.parked);
      gradient.mixed(shared.parked);
      unpark(shared.parked, fragment);
    }
#pragma unroll
    for (int k = 0; k < Config::kAccumulators; ++k) store_fragment(fragment, k, p.tile, place, p.out[k], p.out_stride);
    ptx::sync_block();
    shared.scores.store(p, place);
    if constexpr (!Objective::kNeedsStatistics)
      if (p.row_partials) shared.exchange.merge_rows();
  }
  if constexpr (!Objective::kNeedsStatistics)
    if (p.row_partials) shared.exchange.store_rows(p, walk, p.row_partials);
  shared.parameters.store(p.parameters + 2 * ptx::block_index());
}

template <class Config, class Similarity>
struct DerivativeShared {
  union {
    Stage<Config> stages[Config::kStages];
    Parked<Config> parked;
  };
  Factors<Config, Similarity> factors;
  ColumnScores<Config> scores;
};

// dL/daccumulator from a given dL/dsim. Rolled: the addresses of what is given would take the registers of the
// products.
template <class Config, class Similarity>
SK_KERNEL(Config::kThreads, Config::kBlocks)
derivative(SK_PARAMETER Derivative p) {
  using F = Fragment<Config>;
  auto& shared = ptx::shared_storage<DerivativeShared<Config, Similarity>>();
  const Walk walk = Walk::of<Config>(p);
  const float unit = p.unit ? *p.unit : 1.0f;
  shared.factors.bring_rows(p, walk.row_tile * Config::kBlockN);
  for (int column_tile = walk.begin; column_tile < walk.end; ++column_tile) {
    const Place place{walk.row_tile * Config::kBlockN, column_tile * Config::kBlockM};
    F fragment;
    shared.factors.bring_columns(p, place.column);
    products<Config, Similarity>(p.tile, place, shared.stages, fragment);
    park(fragment, shared.parked);
#pragma unroll 1
    for (int c = 0; c < F::kColumns; ++c) {
      float along = 0;
#pragma unroll 1
      for (int r = 0; r < F::kRows; ++r) {
        const int row = place.row + F::row(r), column = place.column + F::column(c);
        const bool inside = row < p.tile.rows && column < p.tile.columns;
        const float given = inside ? p.grad_sim[int64_t(row) * p.tile.columns + column] / unit : 0.0f;
        const ScoreOf<Config, Similarity> score(shared.factors, shared.parked, r, c);
        along += inside ? given * score.sim : 0.0f;
        score.derive(shared.parked, given, r, c);
      }
      if (p.column_scores) shared.scores.put(c, along);
    }
    unpark(shared.parked, fragment);
#pragma unroll
    for (int k = 0; k < Config::kAccumulators; ++k) store_fragment(fragment, k, p.tile, place, p.out[k], p.out_stride);
    ptx::sync_block();
    shared.scores.store(p, place);
  }
}

}  // namespace smartclip::cuda::sm80
