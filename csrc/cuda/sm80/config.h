// The numbers of the sm_80 kernels: sizes of tiles, stages and warps, for each element type and number of accumulators.
#pragma once

#include "kernels.h"
#include "ptx/matrix.h"

#ifndef SK_KEEPS_HALF
#define SK_KEEPS_HALF 0  // whether products of half precision are kept
#endif

namespace smartclip::cuda::sm80 {

template <class Element_, int kAccumulators_>
struct Config {
  using Element = Element_;
  static constexpr int kAccumulators = kAccumulators_;
  static constexpr bool kExact = std::is_same_v<Element, float>;  // number by number instead of on the matrix unit

  static constexpr int kElementBytes = kExact || std::is_same_v<Element, ptx::Tf32> ? 4 : 2;

  // A warp's part is 64 × 64 of one accumulator, or 64 × 32 of two: 128 sums a thread. Operands of 4 bytes take more
  // registers: half of that, and twice the warps.
  static constexpr int kWarpsN = 2, kWarpsM = kElementBytes == 4 ? 4 : 2;
  static constexpr int kWarpN = 64, kWarpM = 128 / kWarpsM / kAccumulators;
  static constexpr int kBlockN = kWarpsN * kWarpN, kBlockM = kWarpsM * kWarpM;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsM;

  // Depth goes by rows of 64 bytes: 32 numbers of half precision, 16 of float32.
  static constexpr int kRowBytes = 64, kStages = 4;
  static constexpr int kDepth = kRowBytes / kElementBytes;

  // Whether an epilogue of two accumulators reads what it knows of rows anew for every column: it has no registers
  // left.
  static constexpr bool kReadsAnew = kAccumulators > 1;

  // Whether products are kept for the backward sweep where they fit the workspace: 4 bytes written and read a product
  // in place of D multiplications. Those of float32 take longer; on the matrix unit, half precision does not.
  static constexpr bool kKeeps = kElementBytes == 4 || SK_KEEPS_HALF;

  // Two on a multiprocessor: one multiplies while the other is in its epilogue.
  static constexpr int kBlocks = kElementBytes == 4 ? 1 : 2;
};

// Blocks own tiles of rows and go over several of columns; enough of them that the last round is a small part of all.
template <class Config>
Plan plan(int rows, int columns, int multiprocessors) {
  constexpr int kRounds = 4, kMostTiles = 16;
  Plan plan;
  plan.row_tiles = (rows + Config::kBlockN - 1) / Config::kBlockN;
  plan.column_tiles = (columns + Config::kBlockM - 1) / Config::kBlockM;
  const int64_t wanted = int64_t(kRounds) * Config::kBlocks * multiprocessors;
  const int64_t tiles = int64_t(plan.row_tiles) * plan.column_tiles / wanted;
  plan.tiles_a_walk = static_cast<int>(tiles < 1 ? 1 : tiles > kMostTiles ? kMostTiles : tiles);
  plan.parts = (plan.column_tiles + plan.tiles_a_walk - 1) / plan.tiles_a_walk;
  plan.blocks = int64_t(plan.row_tiles) * plan.parts;
  plan.slots = {plan.parts, plan.row_tiles, plan.blocks};
  plan.search_slots = {plan.column_tiles, plan.row_tiles, plan.blocks};
  return plan;
}

}  // namespace smartclip::cuda::sm80
