// What epilogues of a warpgroup share. A warp goes over its part in chunks of columns: in most of them all pairs are
// plain, and many are done at once, in registers; the others are parked in shared memory and done pair by pair.
#pragma once

#include "sm90/pipeline.cuh"
#include "tile/scores.h"

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
// products; end(walk, index), then a barrier.
template <class Config, class Passes, class Parameters, class Begin, class OneTile, class End>
SK_DEVICE void for_tiles(const Launched<Parameters, Passes>& p, Pipeline<Config>& pipeline, WalkAt<Config>& at,
                         Begin begin, OneTile tile, End end) {
  const Walk& walk = at.walk;
  int& index = at.index[Warpgroup<Config>::thread()];
  Products<Config, Passes> products(p.tile, pipeline, Warpgroup<Config>::index());
#pragma unroll 1
  for (index = ptx::block_index(); index < Walk::count<Config>(p); index += p.blocks) {
    if (Warpgroup<Config>::thread() == 0) at.walk = Walk::of<Config>(p, index);
    begin(Walk::of<Config>(p, index).column_tile * Config::kBlockM);
    Warpgroup<Config>::sync();
#pragma unroll 1
    for (int row_tile = walk.begin; row_tile < walk.end; ++row_tile) {
      Fragment<Config> fragment;
      products.multiply(fragment);
      tile(Place{row_tile * Config::kBlockN, walk.column_tile * Config::kBlockM}, fragment);
    }
    end(walk, index);
    Warpgroup<Config>::sync();
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

// A chunk of a thread's fragment in shared memory, where an index may be known at run time only.
template <class Config>
struct ParkedChunk {
  float number[Config::kAccumulators][kRows * Config::kChunk][Config::kWarpgroup];

  SK_DEVICE float& at(int accumulator, int r, int c) {
    return number[accumulator][r * Config::kChunk + c % Config::kChunk][Warpgroup<Config>::thread()];
  }
  SK_DEVICE float at(int accumulator, int r, int c) const {
    return number[accumulator][r * Config::kChunk + c % Config::kChunk][Warpgroup<Config>::thread()];
  }
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

// What is known of a walk's columns, in shared memory. After bring(), a barrier.
template <class Config>
struct ColumnIds {
  int32_t id[Config::kBlockM], ignore[Config::kBlockM];

  SK_DEVICE void bring(const Scores& p, int first) {
    const Side<float>& side = p.problem.column;
    for_own_columns<Config>([&](int, int column) {
      const bool inside = first + column < p.tile.columns;
      const int64_t at = p.tile.column + first + column;
      id[column] = inside ? side.id[at] : 0;
      ignore[column] = inside && side.ignore ? side.ignore[at] : 0;
    });
  }
};

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

// Chunks of a warp's part, a bit each: all pairs plain, or to be looked at one by one. Rows beyond the part have none.
struct Chunks {
  uint32_t plain, mixed;

  template <class Config>
  SK_DEVICE static Chunks of(const Scores& p, Place place, const ColumnIds<Config>& columns) {
    using F = Fragment<Config>;
    const int first = place.row + F::warp_n() * Config::kWarpN;
    if (first >= p.tile.rows) return {0, 0};
    if (first + Config::kWarpN > p.tile.rows) return {0, Config::kAllChunks};
    const Side<float>& side = p.problem.row;
    const int64_t at = p.tile.row + place.row;
    const int32_t id[kRows] = {side.id[at + F::row(0)], side.id[at + F::row(1)]};
    int32_t ignore[kRows] = {};
    if (side.ignore) ignore[0] = side.ignore[at + F::row(0)], ignore[1] = side.ignore[at + F::row(1)];
    uint32_t mixed = 0;
#pragma unroll
    for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
      bool equal = place.column + (chunk + 1) * Config::kChunkColumns > p.tile.columns;
#pragma unroll
      for (int i = 0; i < Config::kChunk; ++i) {
        const int column = F::column(chunk * Config::kChunk + i);
        equal |= columns.id[column] == id[0] || columns.id[column] == id[1];
        if (side.ignore) equal |= columns.ignore[column] == ignore[0] || columns.ignore[column] == ignore[1];
      }
      mixed |= uint32_t(ptx::any_in_warp(equal)) << chunk;
    }
    return {Config::kAllChunks & ~mixed, mixed};
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
