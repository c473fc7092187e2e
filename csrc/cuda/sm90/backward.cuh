// The backward sweep: every score once more, dL/dscore of it, and from that what the products' gradients are made of.
//
// dL/daccumulator goes to memory in the operands' precision, without the incoming gradient's size, 1/N and scale, which
// half precision could not hold; sums are made of the numbers before they are rounded.
#pragma once

#include "sm90/forward.cuh"
#include "sm90/store.cuh"
#include "sm90/sums.cuh"

namespace smartclip::cuda::sm90 {

template <class Config, class Similarity, class Objective>
struct BackwardShared {
  Pipeline<Config> pipeline;
  using ColumnSums = ColumnScores<Config, Similarity::kFactors>;
  struct Consumer {
    Ids<Config> ids;
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
    chunks.look_at_ceilings<Config>(p_, place_, [&](int r, int c) {
      return scale_ * ScoreOf<Config, Similarity>(factors_, fragment, r, c).sim + bias_;
    });
    ParameterSums sums;
    if (Objective::kSmooths && p_.problem.label_smoothing != 0)
      plain<Objective::kSmooths>(fragment, chunks.plain, mine_.shares.shift, share, even, sums, row);
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
        const bool positive = pairs.positive(r, c);
        float anchor[Objective::kAnchor];
        load_row_anchor(r, anchor);
        const ScoreOf<Config, Similarity> score(factors_, parked, r, c);
        const float logit = scale_ * score.sim + bias_;
        const bool for_row = pairs.for_row(r, c, logit);
        const float grad = Objective::gradient(logit, anchor, column, positive, for_row, pairs.for_column(r, c, logit));
        score.derive(parked, grad, r, c);
        of_column.add(grad, grad == 0 ? 0.0f : score.sim);  // not 0 * infinity, where a pair does not count
        if (keeps_states()) state[r].add(logit, positive, for_row);
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

template <class Config, class Similarity, class Objective, bool kKept, class Passes>
SK_DEVICE void consume_gradient(const Launched<Gradient, Passes>& p,
                                BackwardShared<Config, Similarity, Objective>& shared) {
  using State = typename Objective::template State<float>;
  const int consumer = Warpgroup<Config>::index();
  auto& mine = shared.consumers[consumer];
  for_tiles<Config, Passes, kKept>(
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
          store_fragment(fragment, k, p.tile, place, p.out[k], p.out_stride, mine.parked);
        if (mine.scores.wanted(p)) mine.scores.add_tile();
        if constexpr (!Objective::kNeedsStatistics)
          if (p.row_partials) store_row_states<Config>(p, place, row, p.row_partials);
      },
      [&](const Walk& walk, int index) {
        if (mine.scores.wanted(p)) mine.scores.store(p, walk);
        mine.parameters.store(p.parameters + 2 * (int64_t(Config::kConsumers) * index + consumer));
      });
}

template <class Config, class Similarity, class Objective, class Passes, bool kKept>
SK_KERNEL(Config::kThreads, 1)
gradient(SK_PARAMETER Launched<Gradient, Passes> p) {
  run_block<Config, BackwardShared<Config, Similarity, Objective>, kKept>(
      p, [&](auto& shared) { consume_gradient<Config, Similarity, Objective, kKept>(p, shared); });
}

}  // namespace smartclip::cuda::sm90
