// What epilogues of a warpgroup share. A warp goes over its part in chunks of columns: in most of them all pairs are
// plain, and many are done at once, in registers; the others are parked in shared memory and done pair by pair.
#pragma once

#include "sm90/pipeline.cuh"
#include "tile/scores.h"
#include "tile/store.h"

namespace smartclip::cuda::sm90 {

constexpr int kRows = 2;  // of a thread

// A thread in its warpgroup, and the warpgroup's own barrier: who is in an epilogue does not wait for who multiplies.
template <class Config>
struct Warpgroup {
  SK_DEVICE static int index() { return ptx::warp_index() / 4; }
  SK_DEVICE static int warp() { return ptx::warp_index() & 3; }
  SK_DEVICE static int thread() { return ptx::thread_index() & (Config::kWarpgroup - 1); }
  SK_DEVICE static void sync() { ptx::sync_threads(1 + index(), Config::kWarpgroup); }
};

// Where a warpgroup is, in shared memory: in registers it would be in the way of the epilogue.
template <class Config>
struct WalkAt {
  Walk walk;
  int index[Config::kWarpgroup];
};

// What a warpgroup does: begin(first column), then a barrier; tile(place, fragment) of every tile of the walk, with its
// products; end(walk, index), then a barrier. kKept: the sweep before has left the products. That is a kernel of its
// own: where anything else may write the sums of wgmma, the compiler lets no two of them overlap.
template <class Config, class Passes, bool kKept = false, class Parameters, class Begin, class OneTile, class End>
SK_DEVICE void for_tiles(const Launched<Parameters, Passes>& p, Pipeline<Config>& pipeline, WalkAt<Config>& at,
                         Begin begin, OneTile tile, End end) {
  const Walk& walk = at.walk;
  int& index = at.index[Warpgroup<Config>::thread()];
  Products<Config, Passes> products(p.tile, pipeline, Warpgroup<Config>::index());
  if (!kKept && Warpgroup<Config>::index() > 0) products.fall_behind();
#pragma unroll 1
  for (index = ptx::block_index(); index < Walk::count<Config>(p); index += p.blocks) {
    if (Warpgroup<Config>::thread() == 0) at.walk = Walk::of<Config>(p, index);
    begin(Walk::of<Config>(p, index).column_tile * Config::kBlockM);
    Warpgroup<Config>::sync();
#pragma unroll 1
    for (int row_tile = walk.begin; row_tile < walk.end; ++row_tile) {
      const Place place{row_tile * Config::kBlockN, walk.column_tile * Config::kBlockM};
      Fragment<Config> fragment;
      if constexpr (kKept)
        bring_kept(fragment, p, place);
      else
        products.multiply(fragment);
      if constexpr (Config::kKeeps && std::is_base_of_v<Statistics, Parameters>) keep(fragment, p, place);
      tile(place, fragment);
    }
    end(walk, index);
    Warpgroup<Config>::sync();
  }
}

// What a block does: one warpgroup brings operands, and the others call consume(what their epilogues have).
template <class Config, class Shared, bool kKept = false, class Passes, class Parameters, class Consume>
SK_DEVICE void run_block(const Launched<Parameters, Passes>& p, Consume consume) {
  auto& shared = ptx::shared_storage<Shared>();
  clear_count(p);
  shared.pipeline.start();
  if (Warpgroup<Config>::index() == Config::kConsumers) {
    ptx::give_registers<Config::kProducerRegisters>();
    if constexpr (!kKept) bring_operands<Config>(p, shared.pipeline);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    consume(shared);
  }
}

// Calls body(k, column) for those columns of a tile that are a thread's own.
template <class Config, class Body>
SK_DEVICE void for_own_columns(Body body) {
#pragma unroll
  for (int k = 0; k < (Config::kBlockM + Config::kWarpgroup - 1) / Config::kWarpgroup; ++k) {
    const int column = Warpgroup<Config>::thread() + k * Config::kWarpgroup;
    if (column < Config::kBlockM) body(k, column);
  }
}
// For each of them, in registers.
template <class Config, class T>
using OwnColumns = T[(Config::kBlockM + Config::kWarpgroup - 1) / Config::kWarpgroup];

// A chunk of a warp's fragment in shared memory, where an index may be known at run time only. Each warp has a place of
// its own, which it uses for what it stores, too.
template <class Config>
struct ParkedChunk {
  struct alignas(128) OfWarp {
    float number[Config::kAccumulators][kRows * Config::kChunk][ptx::kWarp];
  } warp[4];

  SK_DEVICE float& at(int accumulator, int r, int c) {
    return own().number[accumulator][r * Config::kChunk + c % Config::kChunk][ptx::lane_index()];
  }
  SK_DEVICE float at(int accumulator, int r, int c) const {
    return warp[Warpgroup<Config>::warp()]
        .number[accumulator][r * Config::kChunk + c % Config::kChunk][ptx::lane_index()];
  }
  SK_DEVICE OfWarp& own() { return warp[Warpgroup<Config>::warp()]; }
};

// Calls body(chunk) for a set of them, unrolled; body(i, c) for the columns of one, which are a thread's c.
template <class Config, class Body>
SK_DEVICE void for_chunks(uint32_t set, Body body) {
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk)
    if (set >> chunk & 1) body(chunk);
}
template <class Config, class Body>
SK_DEVICE void for_chunk_columns(int chunk, Body body) {
#pragma unroll
  for (int i = 0; i < Config::kChunk; ++i) body(i, chunk * Config::kChunk + i);
}

// Calls body(accumulator, r, c) for the numbers of a chunk. Registers have no index: every chunk has code of its own.
template <class Config, class Body>
SK_DEVICE void for_chunk(int chunk, int accumulators, Body body) {
#pragma unroll
  for (int k = 0; k < Config::kChunks; ++k) {
    if (k != chunk) continue;
#pragma unroll
    for (int accumulator = 0; accumulator < Config::kAccumulators; ++accumulator) {
      if (accumulator >= accumulators) continue;
#pragma unroll
      for (int i = 0; i < Config::kChunk; ++i)
#pragma unroll
        for (int r = 0; r < kRows; ++r) body(accumulator, r, k * Config::kChunk + i);
    }
  }
}

template <class Config>
SK_DEVICE void park(const Fragment<Config>& fragment, int chunk, ParkedChunk<Config>& parked,
                    int accumulators = Config::kAccumulators) {
  for_chunk<Config>(chunk, accumulators, [&](int k, int r, int c) { parked.at(k, r, c) = fragment.at(k, r, c); });
}

template <class Config>
SK_DEVICE void unpark(const ParkedChunk<Config>& parked, int chunk, Fragment<Config>& fragment) {
  for_chunk<Config>(chunk, Config::kAccumulators,
                    [&](int k, int r, int c) { fragment.at(k, r, c) = parked.at(k, r, c); });
}

// Ids of a walk's columns, in shared memory, and between which numbers they are. After bring(), a barrier.
template <class Config>
class ColumnIds {
  using F = Fragment<Config>;

 public:
  // id_of(column): of the whole problem's. Columns beyond the part have the id of the first.
  template <class IdOf>
  SK_DEVICE void bring(const Scores& p, int first, IdOf id_of) {
    uint32_t most = 0, most_below = 0;
    for_own_columns<Config>([&](int, int column) {
      const int32_t id = id_of(p.tile.column + first + (first + column < p.tile.columns ? column : 0));
      id_[column] = id;
      most = max(most, static_cast<uint32_t>(id));
      most_below = max(most_below, ~static_cast<uint32_t>(id));
    });
    most = Lanes<1, 32>::max(most);
    most_below = Lanes<1, 32>::max(most_below);
    if (ptx::lane_index() != 0) return;
    most_[Warpgroup<Config>::warp()] = most;
    least_[Warpgroup<Config>::warp()] = ~most_below;
  }

  // Chunks of a warp's part in which an id of its rows is.
  SK_DEVICE uint32_t chunks_with(const int32_t (&id)[kRows]) const {
    const uint32_t a = static_cast<uint32_t>(id[0]), b = static_cast<uint32_t>(id[1]);
    const uint32_t most = ColumnLanes::max(max(a, b)), least = ~ColumnLanes::max(max(~a, ~b));
    const auto over = [](const uint32_t (&x)[4]) { return max(max(x[0], x[1]), max(x[2], x[3])); };
    const auto under = [](const uint32_t (&x)[4]) { return min(min(x[0], x[1]), min(x[2], x[3])); };
    if (most < under(least_) || least > over(most_)) return 0;  // as nearly everywhere, where nobody gave ids
    uint32_t chunks = 0;
#pragma unroll
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      bool equal = false;
#pragma unroll
      for (int i = 0; i < Config::kChunk; i += 2) {
        const int2 pair = *reinterpret_cast<const int2*>(id_ + F::column(chunk * Config::kChunk + i));
        if (pair.x == id[0]) equal = true;
        if (pair.x == id[1]) equal = true;
        if (pair.y == id[0]) equal = true;
        if (pair.y == id[1]) equal = true;
      }
      chunks |= uint32_t(ptx::any_in_warp(equal)) << chunk;
    }
    return chunks;
  }

 private:
  SK_DEVICE static uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
  SK_DEVICE static uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

  alignas(8) int32_t id_[Config::kBlockM];
  uint32_t least_[4], most_[4];  // by warp
};

// After bring(), a barrier.
template <class Config, class Similarity>
struct ColumnFactors {
  float factor[Similarity::kFactors ? Config::kBlockM : 1];

  SK_DEVICE void bring(const Scores& p, int first) {
    if constexpr (Similarity::kFactors)
      for_own_columns<Config>([&](int, int column) {
        const bool inside = first + column < p.tile.columns;
        factor[column] = inside ? p.problem.column.factor[p.tile.column + first + column] : 1.0f;
      });
  }
};

// The factors of a thread's rows and columns, as ScoreOf asks for them.
template <class Config, class Similarity>
struct KnownFactors {
  float row[kRows];
  const float* column;

  SK_DEVICE KnownFactors(const Scores& p, Place place, const ColumnFactors<Config, Similarity>& columns)
      : column(columns.factor) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int index = place.row + Fragment<Config>::row(r);
      row[r] = Similarity::kFactors && index < p.tile.rows ? p.problem.row.factor[p.tile.row + index] : 1.0f;
    }
  }
  SK_DEVICE float of_row(int r) const { return row[r]; }
  SK_DEVICE float of_column(int c) const { return Similarity::kFactors ? column[Fragment<Config>::column(c)] : 0.0f; }
};

// What makes pairs differ: equal ids, or equal ids that ignore them.
template <class Config>
struct Ids {
  ColumnIds<Config> id, ignore;

  SK_DEVICE void bring(const Scores& p, int first) {
    const Side<float>& side = p.problem.column;
    id.bring(p, first, [&](int64_t column) { return side.id_of(column); });
    if (side.ignore) ignore.bring(p, first, [&](int64_t column) { return side.ignore[column]; });
  }
};

// Chunks of a warp's part, a bit each: all pairs plain, or to be looked at one by one. Rows beyond the part have none.
struct Chunks {
  uint32_t plain, mixed;

  template <class Config>
  SK_DEVICE static Chunks of(const Scores& p, Place place, const Ids<Config>& ids) {
    using F = Fragment<Config>;
    const int first = place.row + F::warp_n() * Config::kWarpN;
    if (first >= p.tile.rows) return {0, 0};
    if (first + Config::kWarpN > p.tile.rows) return {0, Config::kAllChunks};
    const int whole = (p.tile.columns - place.column) / Config::kChunkColumns;
    uint32_t mixed = whole < Config::kChunks ? Config::kAllChunks & ~0u << whole : 0;
    const Side<float>& side = p.problem.row;
    const int64_t row[kRows] = {p.tile.row + place.row + F::row(0), p.tile.row + place.row + F::row(1)};
    mixed |= ids.id.chunks_with({side.id_of(row[0]), side.id_of(row[1])});
    if (side.ignore) mixed |= ids.ignore.chunks_with({side.ignore[row[0]], side.ignore[row[1]]});
    return {Config::kAllChunks & ~mixed, mixed};
  }

  // Those with a pair above a ceiling have to be looked at, too. logit_at(r, c): of the thread's fragment.
  template <class Config, class LogitAt>
  SK_DEVICE void look_at_ceilings(const Scores& p, Place place, LogitAt logit_at) {
    using F = Fragment<Config>;
    const Side<float>&rows = p.problem.row, &columns = p.problem.column;
    if (!rows.ceiling) return;
    uint32_t above = 0;
    for_chunks<Config>(plain, [&](int chunk) {
      bool any = false;
      for_chunk_columns<Config>(chunk, [&](int, int c) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float logit = logit_at(r, c);
          any |= rows.is_above(p.tile.row + place.row + F::row(r), logit) ||
                 columns.is_above(p.tile.column + place.column + F::column(c), logit);
        }
      });
      above |= uint32_t(ptx::any_in_warp(any)) << chunk;
    });
    plain &= ~above;
    mixed |= above;
  }
};

// Sums over the lanes that share columns of the numbers of eight of them: lanes 4 g to 4 g + 3 get that of number g.
SK_DEVICE float sum_of_own(float (&number)[8]) {
  const int g = ptx::lane_index() / 4;
#pragma unroll
  for (int half = 4; half >= 1; half /= 2) {
    const bool upper = g & half;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float given = ptx::shuffle_xor(upper ? number[k] : number[k + half], 4 * half);
      number[k] = (upper ? number[k + half] : number[k]) + given;
    }
  }
  return number[0];
}

// A number for every column of a tile, from each of a warpgroup's warps.
template <class Config>
struct WarpSums {
  float sum[4][Config::kBlockM];

  // Of the eight columns of a chunk that a thread has; its own numbers are summed over the warp. Returns that of one.
  SK_DEVICE float put(int chunk, float (&number)[Config::kChunk]) {
    static_assert(Config::kChunk == 8, "a lane of a column for each of them");
    const float own = sum_of_own(number);
    at(chunk * Config::kChunk + ptx::lane_index() / 4) = own;
    return own;
  }
  SK_DEVICE float& at(int c) { return sum[Warpgroup<Config>::warp()][Fragment<Config>::column(c)]; }
};

}  // namespace smartclip::cuda::sm90
