// The forward sweep: every score once, reduced at once into the states of its row and its column.
//
// A warpgroup keeps the states of a walk's columns, and leaves one state a row of every tile in a slot of its own.
// gather() merges the slots in order: no atomics, and the same bits every time.
#pragma once

#include "sm90/chunks.cuh"
#include "vectors.cuh"

namespace smartclip::cuda::sm90 {

// What warps of a warpgroup tell each other of a tile's columns: of plain chunks sums with a shift that the warp's
// columns share, of mixed ones, chunk by chunk, states.
template <class Config, class Objective>
struct ColumnExchange {
  using State = typename Objective::template State<float>;
  uint32_t plain[4], mixed[4];
  float shift[4];
  union {
    struct {
      WarpSums<Config> sum, total;
    };
    struct {
      ParkedChunk<Config> logits;
      State state[4][Config::kChunkColumns];
    };
  };
};

template <class Config, class Similarity, class Objective>
struct ForwardShared {
  Pipeline<Config> pipeline;
  struct Consumer {
    Ids<Config> ids;
    ColumnFactors<Config, Similarity> factors;
    ColumnExchange<Config, Objective> exchange;
    OwnColumns<Config, typename Objective::template State<float>> column[Config::kReadsAnew ? Config::kWarpgroup : 1];
    WalkAt<Config> at;
  } consumers[Config::kConsumers];
};

// States of a tile from its logits.
template <class Config, class Objective>
class StatesOf {
  using F = Fragment<Config>;
  using State = typename Objective::template State<float>;
  using Others = typename Objective::template Others<float>;
  using Exchange = ColumnExchange<Config, Objective>;
  static_assert(F::kColumns <= Others::kMost, "a sum of so many");

  // A sum of fewer digits than it should have: its terms are so far below the shift. 2^-100.
  static constexpr float kLeast = 7.8886090522101181e-31f;

 public:
  SK_DEVICE StatesOf(const Scores& p, Place place, Exchange& exchange) : p_(p), place_(place), exchange_(exchange) {}

  // `row`: of the thread's rows, the same in all lanes that share them. `column`: a walk's, of the thread's own
  // columns.
  SK_DEVICE void add(const F& logits, Chunks chunks, State (&row)[kRows], OwnColumns<Config, State>& column) {
    if (!add_plain(logits, chunks.plain, row)) {
      chunks = {0, chunks.plain | chunks.mixed};
      row[0] = row[1] = State::empty();
    }
    if constexpr (Objective::kBothSides)
      add_columns(logits, chunks, row, column);
    else
      add_mixed_rows(logits, chunks.mixed, row);
  }

 private:
  SK_DEVICE void add_columns(const F& logits, Chunks chunks, State (&row)[kRows], OwnColumns<Config, State>& column) {
    const int warp = Warpgroup<Config>::warp();
    if (ptx::lane_index() == 0) {
      exchange_.plain[warp] = chunks.plain;
      exchange_.mixed[warp] = chunks.mixed;
    }
    Warpgroup<Config>::sync();
    merge_plain_columns(column);
    const uint32_t any = exchange_.mixed[0] | exchange_.mixed[1] | exchange_.mixed[2] | exchange_.mixed[3];
    Warpgroup<Config>::sync();
    State mixed_row[kRows] = {State::empty(), State::empty()};
#pragma unroll 1
    for (int chunk = 0; any >> chunk; ++chunk) {
      if (!(any >> chunk & 1)) continue;
      if (chunks.mixed >> chunk & 1) {
        park(logits, chunk, exchange_.logits, 1);
        add_mixed(chunk, mixed_row);
      } else {
        exchange_.state[warp][ptx::lane_index()] = State::empty();
      }
      Warpgroup<Config>::sync();
      merge_mixed_columns(chunk, column);
      Warpgroup<Config>::sync();
    }
    merge_rows(mixed_row, chunks.mixed, row);
  }

  SK_DEVICE void add_mixed_rows(const F& logits, uint32_t mixed, State (&row)[kRows]) {
    State mixed_row[kRows] = {State::empty(), State::empty()};
#pragma unroll 1
    for (int chunk = 0; mixed >> chunk; ++chunk) {
      if (!(mixed >> chunk & 1)) continue;
      park(logits, chunk, exchange_.logits, 1);
      add_mixed(chunk, mixed_row);
    }
    merge_rows(mixed_row, mixed, row);
  }

  SK_DEVICE static void merge_rows(const State (&mixed_row)[kRows], uint32_t mixed, State (&row)[kRows]) {
    if (!mixed) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) row[r].merge(RowLanes::merged(mixed_row[r]));
  }

  SK_DEVICE bool smoothing() const { return p_.problem.label_smoothing != 0; }

  // Whether the sums have all their digits: one shift serves all lines of a warp's part, so that a pair takes one
  // exponential.
  SK_DEVICE bool add_plain(const F& logits, uint32_t plain, State (&row)[kRows]) {
    float shift = 0;
    if constexpr (Objective::kShifts) {
      shift = device::lowest<float>();
      for_chunks<Config>(plain, [&](int chunk) {
        for_chunk_columns<Config>(
            chunk, [&](int, int c) { shift = fmaxf(shift, fmaxf(logits.at(0, 0, c), logits.at(0, 1, c))); });
      });
      shift = Lanes<1, 32>::max(shift);
    }
    Others others[kRows];
    bool sound = true;
    for_chunks<Config>(plain, [&](int chunk) {
      float sum[Config::kChunk];
      for_chunk_columns<Config>(chunk, [&](int i, int c) {
        Others column;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          others[r].add(logits.at(0, r, c), shift);
          if constexpr (Objective::kBothSides) column.add(logits.at(0, r, c), shift);
        }
        if constexpr (Objective::kBothSides) sum[i] = column.sum();
      });
      if constexpr (Objective::kBothSides) sound &= exchange_.sum.put(chunk, sum) >= kLeast;
    });
    float total[kRows] = {};
    if (smoothing())
      for_chunks<Config>(plain, [&](int chunk) {
        float sum[Config::kChunk];
        for_chunk_columns<Config>(chunk, [&](int i, int c) {
          sum[i] = logits.at(0, 0, c) + logits.at(0, 1, c);
#pragma unroll
          for (int r = 0; r < kRows; ++r) total[r] += logits.at(0, r, c);
        });
        if constexpr (Objective::kBothSides) exchange_.total.put(chunk, sum);
      });
    const float count = static_cast<float>(Config::kChunkColumns * __builtin_popcount(plain));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = RowLanes::sum(others[r].sum());
      sound &= plain == 0 || sum >= kLeast;
      row[r] = State::of_others(shift, sum, smoothing() ? RowLanes::sum(total[r]) : 0.0f, count);
    }
    if (ptx::lane_index() == 0) exchange_.shift[Warpgroup<Config>::warp()] = shift;
    return !Objective::kShifts || !ptx::any_in_warp(!sound);
  }

  SK_DEVICE void merge_plain_columns(OwnColumns<Config, State>& state) const {
    for_own_columns<Config>([&](int k, int column) {
#pragma unroll
      for (int warp = 0; warp < 4; ++warp)
        if (exchange_.plain[warp] >> column / Config::kChunkColumns & 1)
          state[k].merge(State::of_others(exchange_.shift[warp], exchange_.sum.sum[warp][column],
                                          smoothing() ? exchange_.total.sum[warp][column] : 0.0f, Config::kWarpN));
    });
  }

  // A parked chunk, pair by pair.
  SK_DEVICE void add_mixed(int chunk, State (&row)[kRows]) {
    const MixedPairs<Config> pairs(p_, place_);
#pragma unroll 1
    for (int i = 0; i < Config::kChunk; ++i) {
      const int c = chunk * Config::kChunk + i;
      State column = State::empty();
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float logit = exchange_.logits.at(0, r, c);
        const bool positive = pairs.positive(r, c);
        row[r].add(logit, positive, pairs.for_row(r, c, logit));
        if constexpr (Objective::kBothSides) column.add(logit, positive, pairs.for_column(r, c, logit));
      }
      if constexpr (Objective::kBothSides) {
        column = ColumnLanes::merged(column);
        if (ptx::lane_index() / 4 == 0)
          exchange_.state[Warpgroup<Config>::warp()][F::column(c) % Config::kChunkColumns] = column;
      }
    }
  }

  SK_DEVICE void merge_mixed_columns(int chunk, OwnColumns<Config, State>& state) const {
    for_own_columns<Config>([&](int k, int column) {
      if (column / Config::kChunkColumns != chunk) return;
#pragma unroll 1
      for (int warp = 0; warp < 4; ++warp) state[k].merge(exchange_.state[warp][column % Config::kChunkColumns]);
    });
  }

  const Scores& p_;
  const Place place_;
  Exchange& exchange_;
};

// States of a tile's rows, to the slot of its tile of columns.
template <class Config, class State>
SK_DEVICE void store_row_states(const Scores& p, Place place, const State (&row)[kRows], float* partials) {
  if (ptx::lane_index() % 4 != 0) return;
  const int64_t slots = (p.tile.columns + Config::kBlockM - 1) / Config::kBlockM;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int index = place.row + Fragment<Config>::row(r);
    if (index < p.tile.rows)
      store_planes(partials + place.column / Config::kBlockM * int64_t(p.tile.rows) + index, slots * p.tile.rows,
                   row[r]);
  }
}

template <class Config, class Similarity, class Objective, class Passes>
SK_DEVICE void consume_statistics(const Launched<Statistics, Passes>& p,
                                  ForwardShared<Config, Similarity, Objective>& shared) {
  using State = typename Objective::template State<float>;
  const int consumer = Warpgroup<Config>::index();
  auto& mine = shared.consumers[consumer];
  OwnColumns<Config, State> in_registers;
  auto& column = Config::kReadsAnew ? mine.column[Warpgroup<Config>::thread()] : in_registers;
  for_tiles<Config, Passes>(
      p, shared.pipeline, mine.at,
      [&](int first_column) {
        mine.ids.bring(p, first_column);
        mine.factors.bring(p, first_column);
        for (State& state : column) state = State::empty();
      },
      [&](Place place, Fragment<Config>& fragment) {
        Chunks chunks = Chunks::of<Config>(p, place, mine.ids);
        const KnownFactors<Config, Similarity> factors(p, place, mine.factors);
        const float scale = *p.problem.scale, bias = p.problem.bias ? *p.problem.bias : 0.0f;
        // Every chunk behind a branch: together, the compiler would give registers to many at once.
        for_chunks<Config>(ptx::computed_here(Config::kAllChunks), [&](int chunk) {
          for_chunk_columns<Config>(chunk, [&](int, int c) {
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              fragment.at(0, r, c) = scale * ScoreOf<Config, Similarity>(factors, fragment, r, c).sim + bias;
          });
        });
        chunks.look_at_ceilings<Config>(p, place, [&](int r, int c) { return fragment.at(0, r, c); });
        State row[kRows];
        StatesOf<Config, Objective>(p, place, mine.exchange).add(fragment, chunks, row, column);
        store_row_states<Config>(p, place, row, p.row_partials);
      },
      [&](const Walk& walk, int) {
        if constexpr (Objective::kBothSides)
          for_own_columns<Config>([&](int k, int at) {
            const int64_t index = walk.column_tile * Config::kBlockM + at;
            const int64_t slots = int64_t(Config::kConsumers) * p.parts;
            const int64_t slot = int64_t(Config::kConsumers) * walk.part + consumer;
            if (index < p.tile.columns)
              store_planes(p.column_partials + slot * p.tile.columns + index, slots * p.tile.columns, column[k]);
          });
      });
}

template <class Config, class Similarity, class Objective, class Passes>
SK_KERNEL(Config::kThreads, 1)
statistics(SK_PARAMETER Launched<Statistics, Passes> p) {
  run_block<Config, ForwardShared<Config, Similarity, Objective>>(p,
                                                                  [&](auto& shared) { consume_statistics(p, shared); });
}

}  // namespace smartclip::cuda::sm90
