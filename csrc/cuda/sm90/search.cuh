// Scores themselves, and searches through them, by the keys of tile/keys.h. Pair by pair: a search makes one product,
// and is no part of training.
#pragma once

#include "sm90/chunks.cuh"
#include "tile/keys.h"

namespace smartclip::cuda::sm90 {

template <class Config, class Similarity>
struct SearchShared {
  Pipeline<Config> pipeline;
  struct Consumer {
    ColumnFactors<Config, Similarity> factors;
    ParkedChunk<Config> parked;
    int64_t found[4][Config::kBlockM];
    WalkAt<Config> at;
  } consumers[Config::kConsumers];
};

template <class Config, class Similarity>
class SearchOf {
  using F = Fragment<Config>;
  using Consumer = typename SearchShared<Config, Similarity>::Consumer;

 public:
  SK_DEVICE SearchOf(const Search& p, Place place, Consumer& mine)
      : p_(p), place_(place), mine_(mine), factors_(p, place, mine.factors) {}

  SK_DEVICE void store(const F& fragment) {
    // Of a thread's rows: one number of each anchor.
    int64_t of_row[kRows] = {none(), none()};
#pragma unroll 1
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      park(fragment, chunk, mine_.parked);
#pragma unroll 1
      for (int i = 0; i < Config::kChunk; ++i) {
        const int c = chunk * Config::kChunk + i;
        int64_t of_column = none();
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (p_.what == Search::kSim || p_.what == Search::kKeys) {
            store_pair(r, c);
            continue;
          }
          const int64_t found = found_of(r, c);
          of_row[r] = joined(of_row[r], found);
          of_column = joined(of_column, found);
        }
        if (p_.per_column && anchors()) {
          of_column = over_lanes<ColumnLanes>(of_column);
          if (ptx::lane_index() / 4 == 0) mine_.found[Warpgroup<Config>::warp()][F::column(c)] = of_column;
        }
      }
    }
    if (!anchors()) return;
    if (p_.per_column) {
      store_columns();
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t found = over_lanes<RowLanes>(of_row[r]);
      if (ptx::lane_index() % 4 == 0) store_anchor(place_.column / Config::kBlockM, row(r), p_.tile.rows, found);
    }
  }

 private:
  SK_DEVICE bool anchors() const { return p_.what == Search::kBestPositive || p_.what == Search::kAhead; }
  SK_DEVICE int row(int r) const { return place_.row + F::row(r); }
  SK_DEVICE int column(int c) const { return place_.column + F::column(c); }
  SK_DEVICE bool inside(int r, int c) const { return row(r) < p_.tile.rows && column(c) < p_.tile.columns; }
  SK_DEVICE float sim(int r, int c) const { return ScoreOf<Config, Similarity>(factors_, mine_.parked, r, c).sim; }
  SK_DEVICE int64_t key(int r, int c) const {
    return key_of(sim(r, c), p_.first + (p_.per_column ? row(r) : column(c)));
  }

  SK_DEVICE void store_pair(int r, int c) const {
    if (!inside(r, c)) return;
    const int64_t to = row(r) * p_.row_stride + column(c) * p_.column_stride;
    if (p_.what == Search::kSim)
      static_cast<float*>(p_.out)[to] = sim(r, c);
    else
      static_cast<int64_t*>(p_.out)[to] = key(r, c);
  }

  // Of a pair: its key where it is positive, or whether it is better than the anchor's best. Then the largest, or all.
  SK_DEVICE int64_t none() const { return p_.what == Search::kAhead ? 0 : kNoKey; }
  SK_DEVICE int64_t found_of(int r, int c) const {
    if (!inside(r, c)) return none();
    if (p_.what == Search::kAhead) return key(r, c) > p_.best[p_.per_column ? column(c) : row(r)];
    const bool positive =
        p_.problem.row.id_of(p_.tile.row + row(r)) == p_.problem.column.id_of(p_.tile.column + column(c));
    return positive ? key(r, c) : kNoKey;
  }
  SK_DEVICE int64_t joined(int64_t a, int64_t b) const { return p_.what == Search::kAhead ? a + b : a > b ? a : b; }
  template <class Lanes>
  SK_DEVICE int64_t over_lanes(int64_t found) const {
    const long long own = found;
    return p_.what == Search::kAhead ? Lanes::sum(own) : Lanes::max(own);
  }

  SK_DEVICE void store_columns() const {
    Warpgroup<Config>::sync();
    for_own_columns<Config>([&](int, int at) {
      int64_t found = mine_.found[0][at];
      for (int warp = 1; warp < 4; ++warp) found = joined(found, mine_.found[warp][at]);
      const int slot = place_.row / Config::kBlockN * Config::kConsumers + Warpgroup<Config>::index();
      store_anchor(slot, place_.column + at, p_.tile.columns, found);
    });
    Warpgroup<Config>::sync();
  }
  SK_DEVICE void store_anchor(int slot, int anchor, int count, int64_t found) const {
    if (anchor >= count) return;
    const int64_t to = int64_t(slot) * count + anchor;
    if (p_.what == Search::kAhead)
      static_cast<int32_t*>(p_.out)[to] = static_cast<int32_t>(found);
    else
      static_cast<int64_t*>(p_.out)[to] = found;
  }

  const Search& p_;
  const Place place_;
  Consumer& mine_;
  const KnownFactors<Config, Similarity> factors_;
};

template <class Config, class Similarity, class Passes>
SK_KERNEL(Config::kThreads, 1)
search(SK_PARAMETER Launched<Search, Passes> p) {
  run_block<Config, SearchShared<Config, Similarity>>(p, [&](auto& shared) {
    auto& mine = shared.consumers[Warpgroup<Config>::index()];
    for_tiles<Config, Passes>(
        p, shared.pipeline, mine.at, [&](int first_column) { mine.factors.bring(p, first_column); },
        [&](Place place, Fragment<Config>& fragment) { SearchOf<Config, Similarity>(p, place, mine).store(fragment); },
        [](const Walk&, int) {});
  });
}

}  // namespace smartclip::cuda::sm90
