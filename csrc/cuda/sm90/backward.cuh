// The backward sweep: every score once more, dL/dscore of it, and from that what the products' gradients are made of.
//
// dL/daccumulator goes to memory in the operands' precision, without the incoming gradient's size, 1/N and scale, which
// half precision could not hold; sums are made of the numbers before they are rounded.
#pragma once

#include "sm90/forward.cuh"
#include "tile/store.h"

namespace smartclip::cuda::sm90 {

template <class Objective>
SK_DEVICE void load_anchor(const Side<float>& side, int64_t index, float (&anchor)[Objective::kAnchor]) {
#pragma unroll
  for (int k = 0; k < Objective::kAnchor; ++k) anchor[k] = side.anchor[k * side.size + index];
}

// What G of plain pairs needs of a walk's columns: shares with one shift, for the columns and for what rows they meet.
// Shares are finite, and G has all its digits, where shifts are not further than kReach from that.
template <class Config, class Objective>
struct ColumnShares {
  static constexpr float kReach = 40;
  float share[Objective::kBothSides ? Config::kBlockM : 1], even[Objective::kBothSides ? Config::kBlockM : 1];
  float least[4], most[4];  // of the columns' own shifts, by warp

  float shift, furthest;

  SK_DEVICE bool reaches(float other) const { return furthest <= kReach && fabsf(other - shift) <= kReach; }

  // By a whole warpgroup; then a barrier.
  SK_DEVICE void bring(const Scores& p, int first) {
    if constexpr (Objective::kBothSides)
      bring_columns(p, first);
    else if (Warpgroup<Config>::thread() == 0)
      shift = furthest = 0;
  }

 private:
  SK_DEVICE void bring_columns(const Scores& p, int first) {
    float anchor[(Config::kBlockM + Config::kWarpgroup - 1) / Config::kWarpgroup][Objective::kAnchor] = {};
    const float kFar = -device::lowest<float>();
    float least_own = kFar, most_own = -kFar;
    for_own_columns<Config>([&](int k, int column) {
      if (first + column >= p.tile.columns) return;
      load_anchor<Objective>(p.problem.column, p.tile.column + first + column, anchor[k]);
      const float shift = Objective::shift_of(anchor[k]);
      // A NaN is nowhere near.
      least_own = shift == shift ? fminf(least_own, shift) : -kFar;
      most_own = shift == shift ? fmaxf(most_own, shift) : kFar;
    });
    const int warp = Warpgroup<Config>::warp();
    least_own = -Lanes<1, 32>::max(-least_own);
    most_own = Lanes<1, 32>::max(most_own);
    if (ptx::lane_index() == 0) least[warp] = least_own, most[warp] = most_own;
    Warpgroup<Config>::sync();
    const float low = fminf(fminf(least[0], least[1]), fminf(least[2], least[3]));
    const float high = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    for_own_columns<Config>([&](int k, int column) {
      const bool inside = first + column < p.tile.columns;
      share[column] = inside ? Objective::share(anchor[k], low) : 0.0f;
      even[column] = inside ? Objective::even(anchor[k]) : 0.0f;
    });
    if (Warpgroup<Config>::thread() == 0) shift = low, furthest = high - low;
  }
};

// Of G * sim and of G. Long sums of numbers that are alike would lose digits: columns are summed apart, and chunks.
struct ParameterSums {
  float along = 0, total = 0;

  SK_DEVICE void add(float grad, float sim) {
    along = fmaf(grad, sim, along);
    total += grad;
  }
  SK_DEVICE void add(const ParameterSums& other) {
    along += other.along;
    total += other.total;
  }
};

// Sums of G * sim and of G over a walk, of every thread of a warpgroup: in registers they would be in the way.
template <class Config>
struct ParameterTotals {
  double along_sim[Config::kWarpgroup], total[Config::kWarpgroup];

  SK_DEVICE void clear() { along_sim[Warpgroup<Config>::thread()] = total[Warpgroup<Config>::thread()] = 0; }
  SK_DEVICE void add(const ParameterSums& sums) {
    along_sim[Warpgroup<Config>::thread()] += sums.along;
    total[Warpgroup<Config>::thread()] += sums.total;
  }
  // Over the warpgroup, in a fixed order.
  SK_DEVICE void store(double* out) const {
    Warpgroup<Config>::sync();
    if (Warpgroup<Config>::warp() >= 2) return;
    const double* const numbers = Warpgroup<Config>::warp() == 0 ? along_sim : total;
    double sum = 0;
    for (int k = ptx::lane_index(); k < Config::kWarpgroup; k += ptx::kWarp) sum += numbers[k];
    sum = Lanes<1, ptx::kWarp>::sum(sum);
    if (ptx::lane_index() == 0) out[Warpgroup<Config>::warp()] = sum;
  }
};

// Sums over a walk's rows of dL/dsim * sim; nothing where no column has a factor that they are the gradient of.
template <class Config, bool kThere>
struct ColumnScores {
  SK_DEVICE static bool wanted(const Derivative&) { return false; }
  SK_DEVICE void clear() {}
  SK_DEVICE void put(int, float (&)[Config::kChunk]) {}
  SK_DEVICE void put_column(int, float) {}
  SK_DEVICE void add_tile() {}
  SK_DEVICE void store(const Derivative&, const Walk&) const {}
};

template <class Config>
struct ColumnScores<Config, true> {
  WarpSums<Config> of_tile;
  float total[Config::kBlockM];

  SK_DEVICE static bool wanted(const Derivative& p) { return p.column_scores; }
  SK_DEVICE void put(int chunk, float (&along)[Config::kChunk]) { of_tile.put(chunk, along); }
  // Column c of a thread, of which it has a part.
  SK_DEVICE void put_column(int c, float along) {
    along = ColumnLanes::sum(along);
    if (ptx::lane_index() / 4 == 0) of_tile.at(c) = along;
  }

  SK_DEVICE void clear() {
    for_own_columns<Config>([&](int, int column) { total[column] = 0; });
  }
  // By a whole warpgroup, whose warps have put their sums of a tile.
  SK_DEVICE void add_tile() {
    Warpgroup<Config>::sync();
    for_own_columns<Config>([&](int, int column) {
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) total[column] += of_tile.sum[warp][column];
    });
    Warpgroup<Config>::sync();
  }
  SK_DEVICE void store(const Derivative& p, const Walk& walk) const {
    for_own_columns<Config>([&](int, int at) {
      const int column = walk.column_tile * Config::kBlockM + at;
      const int64_t slot = int64_t(Config::kConsumers) * walk.part + Warpgroup<Config>::index();
      if (column < p.tile.columns) p.column_scores[slot * p.tile.columns + column] = total[at];
    });
  }
};

template <class Config, class Similarity, class Objective>
struct BackwardShared {
  Pipeline<Config> pipeline;
  using ColumnSums = ColumnScores<Config, Similarity::kFactors>;
  struct Consumer {
    ColumnIds<Config> ids;
    ColumnFactors<Config, Similarity> factors;
    ColumnShares<Config, Objective> shares;
    ColumnSums scores;
    ParkedChunk<Config> parked;
    ParameterTotals<Config> parameters;
    WalkAt<Config> at;
  } consumers[Config::kConsumers];
};

// G of a tile's pairs from their scores, dL/daccumulator in place of the products, and the sums that G is good for.
template <class Config, class Similarity, class Objective>
class GradientOf {
  using F = Fragment<Config>;
  using State = typename Objective::template State<float>;
  using Others = typename Objective::template Others<float>;
  using Consumer = typename BackwardShared<Config, Similarity, Objective>::Consumer;

 public:
  SK_DEVICE GradientOf(const Gradient& p, Place place, Consumer& mine)
      : p_(p),
        place_(place),
        scale_(*p.problem.scale),
        bias_(p.problem.bias ? *p.problem.bias : 0.0f),
        mine_(mine),
        factors_(p, place, mine.factors) {}

  SK_DEVICE ParameterSums replace(F& fragment, Chunks chunks, State (&row)[kRows]) {
    bool near = true;
    float share[kRows], even[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float anchor[Objective::kAnchor];
      load_row_anchor(r, anchor);
      near &= mine_.shares.reaches(Objective::shift_of(anchor));
      share[r] = Objective::share(anchor, mine_.shares.shift);
      even[r] = Objective::even(anchor);
    }
    if (ptx::any_in_warp(!near)) chunks = {0, chunks.plain | chunks.mixed};
    ParameterSums sums;
    if (p_.problem.label_smoothing != 0)
      plain<true>(fragment, chunks.plain, mine_.shares.shift, share, even, sums, row);
    else
      plain<false>(fragment, chunks.plain, mine_.shares.shift, share, even, sums, row);
#pragma unroll 1
    for (int chunk = 0; chunks.mixed >> chunk; ++chunk)
      if (chunks.mixed >> chunk & 1) mixed(fragment, chunk, sums, row);
    if (mine_.scores.wanted(p_) && !(chunks.plain | chunks.mixed))  // rows beyond the part
      for (int c = 0; c < F::kColumns; ++c) mine_.scores.put_column(c, 0.0f);
    return sums;
  }

 private:
  // Rows beyond the part have the first one's: there, no pair counts.
  SK_DEVICE void load_row_anchor(int r, float (&anchor)[Objective::kAnchor]) const {
    const int index = place_.row + F::row(r);
    load_anchor<Objective>(p_.problem.row, p_.tile.row + (index < p_.tile.rows ? index : 0), anchor);
  }
  SK_DEVICE bool keeps_states() const { return !Objective::kNeedsStatistics && p_.row_partials; }

  template <bool kEven>
  SK_DEVICE void plain(F& fragment, uint32_t chunks, float shift, const float (&share)[kRows],
                       const float (&even)[kRows], ParameterSums& sums, State (&row)[kRows]) {
    Others others[kRows];
    for_chunks<Config>(chunks, [&](int chunk) {
      ParameterSums of_chunk;
      float along[Config::kChunk];
      for_chunk_columns<Config>(chunk, [&](int i, int c) {
        ParameterSums of_column;
        const float column_share = Objective::kBothSides ? mine_.shares.share[F::column(c)] : 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const ScoreOf<Config, Similarity> score(factors_, fragment, r, c);
          const float logit = scale_ * score.sim + bias_;
          if (keeps_states()) others[r].add(logit, shift);
          float grad = Objective::other_slope(logit, shift) * (share[r] + column_share);
          if constexpr (kEven) grad -= even[r] + (Objective::kBothSides ? mine_.shares.even[F::column(c)] : 0.0f);
          score.derive(fragment, grad, r, c);
          of_column.add(grad, score.sim);
        }
        along[i] = of_column.along;
        of_chunk.add(of_column);
        if constexpr (Config::kReadsAnew) ptx::keep_order();
      });
      if (mine_.scores.wanted(p_)) mine_.scores.put(chunk, along);
      sums.add(of_chunk);
    });
    if (keeps_states())
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        row[r] = State::of_others(shift, RowLanes::sum(others[r].sum()), 0.0f,
                                  static_cast<float>(Config::kChunkColumns * __builtin_popcount(chunks)));
  }

  // Pair by pair.
  SK_DEVICE void mixed(F& fragment, int chunk, ParameterSums& sums, State (&row)[kRows]) {
    const MixedPairs<Config> pairs(p_, place_);
    auto& parked = mine_.parked;
    State state[kRows] = {State::empty(), State::empty()};
    park(fragment, chunk, parked);
#pragma unroll 1
    for (int i = 0; i < Config::kChunk; ++i) {
      const int c = chunk * Config::kChunk + i, index = place_.column + F::column(c);
      float column[Objective::kAnchor] = {};
      if (Objective::kBothSides && index < p_.tile.columns)
        load_anchor<Objective>(p_.problem.column, p_.tile.column + index, column);
      ParameterSums of_column;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool positive = pairs.positive(r, c), candidate = pairs.candidate(r, c);
        float anchor[Objective::kAnchor];
        load_row_anchor(r, anchor);
        const ScoreOf<Config, Similarity> score(factors_, parked, r, c);
        const float logit = scale_ * score.sim + bias_;
        const float grad = Objective::gradient(logit, anchor, column, positive, candidate);
        score.derive(parked, grad, r, c);
        of_column.add(grad, grad == 0 ? 0.0f : score.sim);  // not 0 * infinity, where a pair does not count
        if (keeps_states()) state[r].add(logit, positive, candidate);
      }
      sums.add(of_column);
      if (mine_.scores.wanted(p_)) mine_.scores.put_column(c, of_column.along);
    }
    unpark(parked, chunk, fragment);
    if (keeps_states())
#pragma unroll
      for (int r = 0; r < kRows; ++r) row[r].merge(RowLanes::merged(state[r]));
  }

  const Gradient& p_;
  const Place place_;
  const float scale_, bias_;
  Consumer& mine_;
  const KnownFactors<Config, Similarity> factors_;
};

template <class Config, class Similarity, class Objective, class Passes>
SK_DEVICE void consume_gradient(const Launched<Gradient, Passes>& p,
                                BackwardShared<Config, Similarity, Objective>& shared) {
  using State = typename Objective::template State<float>;
  const int consumer = Warpgroup<Config>::index();
  auto& mine = shared.consumers[consumer];
  for_tiles<Config, Passes>(
      p, shared.pipeline, mine.at,
      [&](int first_column) {
        mine.ids.bring(p, first_column);
        mine.factors.bring(p, first_column);
        mine.shares.bring(p, first_column);
        mine.scores.clear();
        mine.parameters.clear();
      },
      [&](Place place, Fragment<Config>& fragment) {
        const Chunks chunks = Chunks::of<Config>(p, place, mine.ids);
        State row[kRows] = {State::empty(), State::empty()};
        GradientOf<Config, Similarity, Objective> gradient(p, place, mine);
        mine.parameters.add(gradient.replace(fragment, chunks, row));
#pragma unroll
        for (int k = 0; k < Config::kAccumulators; ++k)
          store_fragment(fragment, k, p.tile, place, p.out[k], p.out_stride);
        if (mine.scores.wanted(p)) mine.scores.add_tile();
        if constexpr (!Objective::kNeedsStatistics)
          if (p.row_partials) store_row_states<Config>(p, place, row, p.row_partials);
      },
      [&](const Walk& walk, int index) {
        if (mine.scores.wanted(p)) mine.scores.store(p, walk);
        mine.parameters.store(p.parameters + 2 * (int64_t(Config::kConsumers) * index + consumer));
      });
}

template <class Config, class Similarity, class Objective, class Passes>
SK_KERNEL(Config::kThreads, 1)
gradient(SK_PARAMETER Launched<Gradient, Passes> p) {
  auto& shared = ptx::shared_storage<BackwardShared<Config, Similarity, Objective>>();
  shared.pipeline.start();
  if (Warpgroup<Config>::index() == Config::kConsumers) {
    ptx::give_registers<Config::kProducerRegisters>();
    bring_operands<Config>(p, shared.pipeline);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    consume_gradient(p, shared);
  }
}

template <class Config, class Similarity>
struct DerivativeShared {
  Pipeline<Config> pipeline;
  using ColumnSums = ColumnScores<Config, Similarity::kFactors>;
  struct Consumer {
    ColumnFactors<Config, Similarity> factors;
    ColumnSums scores;
    ParkedChunk<Config> parked;
    WalkAt<Config> at;
  } consumers[Config::kConsumers];
};

// dL/daccumulator from a given dL/dsim, pair by pair.
template <class Config, class Similarity, class Passes>
SK_DEVICE void consume_derivative(const Launched<Derivative, Passes>& p, DerivativeShared<Config, Similarity>& shared) {
  using F = Fragment<Config>;
  auto& mine = shared.consumers[Warpgroup<Config>::index()];
  const float unit = p.unit ? *p.unit : 1.0f;
  for_tiles<Config, Passes>(
      p, shared.pipeline, mine.at,
      [&](int first_column) {
        mine.factors.bring(p, first_column);
        mine.scores.clear();
      },
      [&](Place place, F& fragment) {
        const KnownFactors<Config, Similarity> factors(p, place, mine.factors);
#pragma unroll 1
        for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
          park(fragment, chunk, mine.parked);
#pragma unroll 1
          for (int i = 0; i < Config::kChunk; ++i) {
            const int c = chunk * Config::kChunk + i, column = place.column + F::column(c);
            float along = 0;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const int row = place.row + F::row(r);
              const bool inside = row < p.tile.rows && column < p.tile.columns;
              const float given = inside ? p.grad_sim[int64_t(row) * p.tile.columns + column] / unit : 0.0f;
              const ScoreOf<Config, Similarity> score(factors, mine.parked, r, c);
              along += inside ? given * score.sim : 0.0f;
              score.derive(mine.parked, given, r, c);
            }
            if (mine.scores.wanted(p)) mine.scores.put_column(c, along);
          }
          unpark(mine.parked, chunk, fragment);
        }
#pragma unroll
        for (int k = 0; k < Config::kAccumulators; ++k)
          store_fragment(fragment, k, p.tile, place, p.out[k], p.out_stride);
        if (mine.scores.wanted(p)) mine.scores.add_tile();
      },
      [&](const Walk& walk, int) {
        if (mine.scores.wanted(p)) mine.scores.store(p, walk);
      });
}

template <class Config, class Similarity, class Passes>
SK_KERNEL(Config::kThreads, 1)
derivative(SK_PARAMETER Launched<Derivative, Passes> p) {
  auto& shared = ptx::shared_storage<DerivativeShared<Config, Similarity>>();
  shared.pipeline.start();
  if (Warpgroup<Config>::index() == Config::kConsumers) {
    ptx::give_registers<Config::kProducerRegisters>();
    bring_operands<Config>(p, shared.pipeline);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    consume_derivative(p, shared);
  }
}

}  // namespace smartclip::cuda::sm90
