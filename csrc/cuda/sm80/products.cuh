// The accumulated products of a block's tile: cp.async into a ring of stages, ldmatrix, mma.
#pragma once

#include "kernels.h"
#include "sm80/config.h"
#include "tile/layout.h"
#include "tile/pairs.h"
#include "tile/passes.h"

namespace smartclip::cuda::sm80 {

// One step of depth: rows of both sides, swizzled.
template <class Config>
struct Stage {
  alignas(128) unsigned char rows[Config::kBlockN * Config::kRowBytes];
  alignas(128) unsigned char columns[Config::kBlockM * Config::kRowBytes];
};

// Copies a tile's steps into stages, one after the other: pass by pass, in each through the depth.
template <class Config, class Passes>
class Loader {
  static constexpr int kChunks = Config::kRowBytes / 16, kRowsACopy = Config::kThreads / kChunks;
  static constexpr int kCopiesN = Config::kBlockN / kRowsACopy, kCopiesM = Config::kBlockM / kRowsACopy;
  static_assert(kCopiesN * kRowsACopy == Config::kBlockN && kCopiesM * kRowsACopy == Config::kBlockM,
                "every thread copies whole rows' chunks");

 public:
  SK_DEVICE Loader(const Tile& tile, Place place, bool inexact)
      : tile_(tile),
        place_(place),
        inexact_(inexact),
        row_(ptx::computed_here(ptx::thread_index() / kChunks)),
        chunk_(ptx::thread_index() % kChunks) {}

  SK_DEVICE bool done() const { return pass_ == Passes::kCount; }

  // The next step; a group of copies of its own, which is empty after the last.
  SK_DEVICE void load(Stage<Config>& stage) {
    if (!done()) {
      const int left = (tile_.depth - depth_) * Config::kElementBytes - 16 * chunk_;
      const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
      copy<kCopiesN>(stage.rows, tile_.row_operands, Passes::row(pass_), place_.row, tile_.rows, bytes);
      copy<kCopiesM>(stage.columns, tile_.column_operands, Passes::column(pass_), place_.column, tile_.columns, bytes);
      depth_ += Config::kDepth;
      if (depth_ >= tile_.depth) {
        depth_ = 0;
        do ++pass_;
        while (!done() && Passes::low(pass_) && !inexact_);
      }
    }
    ptx::commit_copies();
  }

 private:
  // Rows beyond the part, and what is beyond the depth, become 0: of them nothing is read.
  template <int kCopies>
  SK_DEVICE void copy(unsigned char* to, const Operands& operands, int which, int first, int count, int bytes) {
    const int64_t row_bytes = operands.stride * Config::kElementBytes;
    const char* from = static_cast<const char*>(operands.matrix[which]) + (first + row_) * row_bytes +
                       int64_t(depth_) * Config::kElementBytes + 16 * chunk_;
#pragma unroll
    for (int k = 0; k < kCopies; ++k) {
      const int row = row_ + k * kRowsACopy;
      ptx::copy_async_16(to + swizzled<Config::kRowBytes>(row, chunk_), from, first + row < count ? bytes : 0);
      from += kRowsACopy * row_bytes;
    }
  }

  const Tile& tile_;
  const Place place_;
  const bool inexact_;
  const int row_, chunk_;
  int pass_ = 0, depth_ = 0;
};

// sum += rows columns^T over the depth of a stage, on the matrix unit.
template <class Config>
SK_DEVICE void multiply_matrices(const Stage<Config>& stage, float (&sum)[Config::kWarpN / 16][Config::kWarpM / 8][4]) {
  using F = Fragment<Config>;
  const int lane = ptx::lane_index();
  const int row = F::warp_n() * Config::kWarpN + lane % 16, row_chunk = lane / 16;
  const int column = F::warp_m() * Config::kWarpM + lane % 8 + lane / 16 * 8, column_chunk = lane / 8 % 2;
#pragma unroll
  for (int chunk = 0; chunk < Config::kRowBytes / 16; chunk += 2) {
    uint32_t a[F::kTilesN][4], b[F::kTilesM / 2][4];
#pragma unroll
    for (int n = 0; n < F::kTilesN; ++n) {
      ptx::load_matrices(a[n], stage.rows + swizzled<Config::kRowBytes>(row + 16 * n, chunk + row_chunk));
      ptx::round_operands<typename Config::Element>(a[n]);
    }
#pragma unroll
    for (int m = 0; m < F::kTilesM / 2; ++m) {
      ptx::load_matrices(b[m], stage.columns + swizzled<Config::kRowBytes>(column + 16 * m, chunk + column_chunk));
      ptx::round_operands<typename Config::Element>(b[m]);
    }
#pragma unroll
    for (int n = 0; n < F::kTilesN; ++n)
#pragma unroll
      for (int m = 0; m < F::kTilesM; ++m)
        ptx::multiply_add<typename Config::Element>(sum[n][m], a[n], b[m / 2][m % 2 * 2], b[m / 2][m % 2 * 2 + 1]);
  }
}

// The same in float32, number by number, for the same places.
template <class Config>
SK_DEVICE void multiply_numbers(const Stage<Config>& stage,
                                float (&part)[Fragment<Config>::kRows][Fragment<Config>::kColumns]) {
  using F = Fragment<Config>;
#pragma unroll 1
  for (int chunk = 0; chunk < Config::kRowBytes / 16; ++chunk) {
    float4 row[F::kRows];
#pragma unroll
    for (int r = 0; r < F::kRows; ++r)
      row[r] = *reinterpret_cast<const float4*>(stage.rows + swizzled<Config::kRowBytes>(F::row(r), chunk));
#pragma unroll
    for (int c = 0; c < F::kColumns; ++c) {
      const float4 column =
          *reinterpret_cast<const float4*>(stage.columns + swizzled<Config::kRowBytes>(F::column(c), chunk));
#pragma unroll
      for (int r = 0; r < F::kRows; ++r) {
        part[r][c] = fmaf(row[r].x, column.x, part[r][c]);
        part[r][c] = fmaf(row[r].y, column.y, part[r][c]);
        part[r][c] = fmaf(row[r].z, column.z, part[r][c]);
        part[r][c] = fmaf(row[r].w, column.w, part[r][c]);
      }
    }
  }
}

// All products of the tile at `place`. Before it no thread may use the stages; after it all of them may.
template <class Config, class Similarity>
SK_DEVICE void products(const Tile& tile, Place place, Stage<Config>* stages, Fragment<Config>& fragment) {
  using Passes = cuda::Passes<Similarity, Config::kElementBytes == 2>;
  constexpr int kStages = Config::kStages;
  const bool inexact = Passes::kLow && *tile.inexact != 0;
  const int steps_a_pass = (tile.depth + Config::kDepth - 1) / Config::kDepth;
  Loader<Config, Passes> loader(tile, place, inexact);
#pragma unroll
  for (int k = 0; k < kStages - 1; ++k) loader.load(stages[k]);

  // Sums of so many steps are made apart: one long chain of additions would lose more digits than a library's product.
  constexpr int kStepsAPart = 4;
  float part[Config::kExact ? Fragment<Config>::kRows : 1][Config::kExact ? Fragment<Config>::kColumns : 1] = {};
  int stage = 0;
#pragma unroll
  for (int accumulator = 0; accumulator < Config::kAccumulators; ++accumulator) {
#pragma unroll
    for (int n = 0; n < Fragment<Config>::kTilesN; ++n)
#pragma unroll
      for (int m = 0; m < Fragment<Config>::kTilesM; ++m)
#pragma unroll
        for (int k = 0; k < 4; ++k) fragment.sum[accumulator][n][m][k] = 0;
    for (int steps = Passes::count(accumulator, inexact) * steps_a_pass; steps > 0; --steps) {
      // This thread's copies are there, then everybody's; and everybody is done with the stage before this one.
      ptx::wait_for_copies<kStages - 2>();
      ptx::sync_block();
      loader.load(stages[(stage + kStages - 1) % kStages]);
      if constexpr (Config::kExact) {
        multiply_numbers(stages[stage], part);
        if (steps % kStepsAPart == 1)
          for_pairs<Config>([&](int r, int c) {
            fragment.at(accumulator, r, c) += part[r][c];
            part[r][c] = 0;
          });
      } else {
        multiply_matrices<Config>(stages[stage], fragment.sum[accumulator]);
      }
      stage = (stage + 1) % kStages;
    }
  }
  ptx::wait_for_copies<0>();
  ptx::sync_block();
}

}  // namespace smartclip::cuda::sm80
