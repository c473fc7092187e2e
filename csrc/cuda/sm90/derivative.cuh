// dL/daccumulator from a given dL/dsim: the backward sweep of scores themselves.
#pragma once

#include "sm90/store.cuh"
#include "sm90/sums.cuh"

namespace smartclip::cuda::sm90 {

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
          store_fragment(fragment, k, p.tile, place, p.out[k], p.out_stride, mine.parked);
        if (mine.scores.wanted(p)) mine.scores.add_tile();
      },
      [&](const Walk& walk, int) {
        if (mine.scores.wanted(p)) mine.scores.store(p, walk);
      });
}

template <class Config, class Similarity, class Passes>
SK_KERNEL(Config::kThreads, 1)
derivative(SK_PARAMETER Launched<Derivative, Passes> p) {
  run_block<Config, DerivativeShared<Config, Similarity>>(p, [&](auto& shared) { consume_derivative(p, shared); });
}

}  // namespace smartclip::cuda::sm90
