// The numbers of the sm_90a kernels: sizes of tiles, stages and warpgroups, and how work is shared out.
#pragma once

#include "kernels.h"
#include "ptx/matrix.h"

// What a card has to choose. Other values by CMAKE_CUDA_FLAGS; `bench/gpu.sh --configs` measures some.
#ifndef SK_SM90_LAG
#define SK_SM90_LAG 2  // steps that the second warpgroup is behind the first
#endif
#ifndef SK_SM90_GROUP
#define SK_SM90_GROUP 2048  // columns that blocks work on at the same time
#endif
#ifndef SK_SM90_WALK
#define SK_SM90_WALK 16  // most tiles of a walk
#endif

#ifndef SK_KEEPS_HALF
#define SK_KEEPS_HALF 0  // whether products are kept for the backward sweep where they fit the workspace
#endif

namespace smartclip::cuda::sm90 {

// A block's tile is 128 rows by kColumns_ columns. Each of two warpgroups multiplies 64 rows of it; a third one has the
// operands brought.
template <class Element_, int kAccumulators_, int kColumns_>
struct Config {
  using Element = Element_;
  static constexpr int kAccumulators = kAccumulators_;
  static constexpr int kElementBytes = 2;
  static_assert(sizeof(Element) == kElementBytes, "half precision");

  static constexpr int kWarpgroup = 128, kConsumers = 2;
  static constexpr int kThreads = kWarpgroup * (kConsumers + 1);
  // A warp's part, as of every matrix instruction: 16 rows, all columns.
  static constexpr int kWarpsN = 4 * kConsumers, kWarpsM = 1, kWarpN = 16, kWarpM = kColumns_;
  static constexpr int kBlockN = kWarpsN * kWarpN, kBlockM = kColumns_;
  static constexpr int kConsumerRows = kBlockN / kConsumers;

  static constexpr size_t kMostShared = 227 << 10;  // of a block, in bytes

  // Depth goes by rows of 128 bytes. One step of both sides is a stage.
  static constexpr int kRowBytes = 128, kDepth = kRowBytes / kElementBytes;
  static constexpr int kStageBytes = (kBlockN + kBlockM) * kRowBytes;
  static constexpr int kStagesBytes = (kAccumulators > 1 ? 160 : 192) << 10;  // the rest is for epilogues
  static constexpr int kStages = kStagesBytes / kStageBytes;

  // The second warpgroup begins so many steps after the first, and stays behind: one multiplies while the other is in
  // its epilogue.
  static constexpr int kLag = SK_SM90_LAG;
  static_assert(kLag < kStages, "who is ahead must not wait for who is behind");

  // Registers of a thread, of 65,536 in all: those that bring operands give theirs to those that multiply.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  // Columns of a thread that are treated alike: plain, or pair by pair.
  static constexpr int kChunk = 8, kChunkColumns = 4 * kChunk, kChunks = kBlockM / kChunkColumns;
  static constexpr uint32_t kAllChunks = (1u << kChunks) - 1;

  // Whether an epilogue of two accumulators reads what it knows anew for every chunk: it has no registers left.
  static constexpr bool kReadsAnew = kAccumulators > 1;

  // 4 bytes written and read a product, or D multiplications of the matrix unit once more: about the same time at D =
  // 512.
  static constexpr bool kKeeps = SK_KEEPS_HALF;

  // Tiles of columns that blocks work on at the same time: those of their operands stay in the second cache.
  static constexpr int kGroup = SK_SM90_GROUP / kBlockM;
};

// As many sums a thread as fit its registers, for most work a byte; or few, for many tiles.
template <class Element, int kAccumulators>
using Wide = Config<Element, kAccumulators, 256 / kAccumulators>;
template <class Element, int kAccumulators>
using Narrow = Config<Element, kAccumulators, 64>;

// Blocks stay, and take walks, a tile of columns each and a run of tiles of rows, until there are none left.
template <class Config>
Plan plan_of(int rows, int columns, int tiles_a_walk, int multiprocessors) {
  Plan plan;
  plan.row_tiles = (rows + Config::kBlockN - 1) / Config::kBlockN;
  plan.column_tiles = (columns + Config::kBlockM - 1) / Config::kBlockM;
  plan.tiles_a_walk = tiles_a_walk;
  plan.parts = (plan.row_tiles + tiles_a_walk - 1) / tiles_a_walk;
  const int64_t walks = int64_t(plan.column_tiles) * plan.parts;
  plan.blocks = walks < multiprocessors ? walks : multiprocessors;
  plan.slots = {plan.column_tiles, int64_t(Config::kConsumers) * plan.parts, Config::kConsumers * walks};
  plan.search_slots = {plan.column_tiles, int64_t(Config::kConsumers) * plan.row_tiles, 0};
  plan.narrow = Config::kBlockM == 64;
  return plan;
}

// What the slowest block does, in columns of a tile: a walk costs some before its first product, a narrow tile more
// than its columns.
template <class Config>
int64_t cost_of(const Plan& plan, int multiprocessors) {
  constexpr int kPerWalk = 64, kPerTile = 24;
  const int64_t walks = int64_t(plan.column_tiles) * plan.parts;
  const int64_t rounds = (walks + multiprocessors - 1) / multiprocessors;
  return rounds * (kPerWalk + plan.tiles_a_walk * (Config::kBlockM + kPerTile));
}

template <class Wide, class Narrow>
Plan plan(int rows, int columns, int multiprocessors) {
  constexpr int kMostTiles = SK_SM90_WALK;
  Plan best = plan_of<Narrow>(rows, columns, 1, multiprocessors);
  int64_t least = cost_of<Narrow>(best, multiprocessors);
  const auto consider = [&](const Plan& plan, int64_t cost) {
    if (cost > least) return;
    best = plan;
    least = cost;
  };
  for (int tiles = 1; tiles <= kMostTiles; ++tiles) {
    const Plan narrow = plan_of<Narrow>(rows, columns, tiles, multiprocessors);
    consider(narrow, cost_of<Narrow>(narrow, multiprocessors));
    const Plan wide = plan_of<Wide>(rows, columns, tiles, multiprocessors);
    consider(wide, cost_of<Wide>(wide, multiprocessors));
  }
  return best;
}

}  // namespace smartclip::cuda::sm90
