// The accumulated products of a tile: one thread has boxes of the operands copied into a ring of stages, warpgroups
// multiply what has come.
#pragma once

#include "kernels.h"
#include "ptx/box.h"
#include "ptx/warpgroup.h"
#include "sm90/config.h"
#include "tile/layout.h"
#include "tile/pairs.h"
#include "tile/passes.h"

namespace smartclip::cuda::sm90 {

// What a launch takes beside the host's parameters.
template <class Parameters, class Passes>
struct Launched : Parameters {
  ptx::TensorMap row_maps[Passes::kRowOperands], column_maps[Passes::kColumnOperands];
  int blocks;
};

// A tile of columns and a run of tiles of rows: `begin` to before `end`. Walks that are under way at the same time
// share tiles of both sides.
struct Walk {
  int column_tile, part, begin, end;

  template <class Config>
  SK_DEVICE static int count(const Scores& scores) {
    return column_tiles<Config>(scores) * scores.parts;
  }
  // Groups of tiles of columns, in each of them part by part.
  template <class Config>
  SK_DEVICE static Walk of(const Scores& scores, int index) {
    const int row_tiles = (scores.tile.rows + Config::kBlockN - 1) / Config::kBlockN;
    const int first = index / (Config::kGroup * scores.parts) * Config::kGroup;
    const int left = column_tiles<Config>(scores) - first, group = left < Config::kGroup ? left : Config::kGroup;
    const int rest = index - first * scores.parts;
    Walk walk;
    walk.column_tile = first + rest % group;
    walk.part = rest / group;
    walk.begin = walk.part * scores.tiles_a_walk;
    walk.end = walk.begin + scores.tiles_a_walk;
    if (walk.end > row_tiles) walk.end = row_tiles;
    return walk;
  }

 private:
  template <class Config>
  SK_DEVICE static int column_tiles(const Scores& scores) {
    return (scores.tile.columns + Config::kBlockM - 1) / Config::kBlockM;
  }
};

// One step of depth: rows of both sides, swizzled.
template <class Config>
struct Stage {
  alignas(1024) unsigned char rows[Config::kBlockN * Config::kRowBytes];
  alignas(1024) unsigned char columns[Config::kBlockM * Config::kRowBytes];
};

template <class Config>
struct Pipeline {
  static constexpr int kStages = Config::kStages;
  Stage<Config> stages[kStages];
  ptx::Barrier full[kStages], empty[kStages];

  // By all threads of the block.
  SK_DEVICE void start() {
    if (ptx::thread_index() == 0) {
#pragma unroll
      for (int k = 0; k < kStages; ++k) {
        ptx::init_barrier(full[k], 1);
        ptx::init_barrier(empty[k], Config::kWarpsN);
      }
      ptx::fence_async();
    }
    ptx::sync_block();
  }
};

// Where one is in the ring.
template <class Config>
struct Turn {
  int stage = 0, parity = 0;

  SK_DEVICE void next() {
    if (++stage < Config::kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// All steps of all of the block's tiles, in the order in which they are multiplied. One thread of the third warpgroup
// does it; the others have nothing to do.
template <class Config, class Passes, class Parameters>
SK_DEVICE void bring_operands(const Launched<Parameters, Passes>& p, Pipeline<Config>& pipeline) {
  if (ptx::thread_index() != Config::kConsumers * Config::kWarpgroup) return;
  for (const ptx::TensorMap& map : p.row_maps) ptx::prefetch_map(map);
  for (const ptx::TensorMap& map : p.column_maps) ptx::prefetch_map(map);
  const bool inexact = Passes::kLow && *p.tile.inexact != 0;
  const int walks = Walk::count<Config>(p);
  Turn<Config> turn;
#pragma unroll 1
  for (int index = ptx::block_index(); index < walks; index += p.blocks) {
    const Walk walk = Walk::of<Config>(p, index);
#pragma unroll 1
    for (int row_tile = walk.begin; row_tile < walk.end; ++row_tile)
#pragma unroll 1
      for (int pass = 0; pass < Passes::kCount; ++pass) {
        if (Passes::low(pass) && !inexact) continue;
#pragma unroll 1
        for (int depth = 0; depth < p.tile.depth; depth += Config::kDepth, turn.next()) {
          Stage<Config>& stage = pipeline.stages[turn.stage];
          ptx::Barrier& full = pipeline.full[turn.stage];
          ptx::wait_for(pipeline.empty[turn.stage], turn.parity ^ 1);
          ptx::arrive_expecting(full, Config::kStageBytes);
          ptx::copy_box(stage.rows, p.row_maps[Passes::row(pass)], depth, row_tile * Config::kBlockN, full);
          ptx::copy_box(stage.columns, p.column_maps[Passes::column(pass)], depth, walk.column_tile * Config::kBlockM,
                        full);
        }
      }
  }
}

// The products of one warpgroup, tile after tile.
template <class Config, class Passes>
class Products {
 public:
  SK_DEVICE Products(const Tile& tile, Pipeline<Config>& pipeline, int consumer)
      : pipeline_(pipeline),
        inexact_(Passes::kLow && *tile.inexact != 0),
        steps_a_pass_((tile.depth + Config::kDepth - 1) / Config::kDepth),
        first_row_(consumer * Config::kConsumerRows * Config::kRowBytes) {}

  // Before the first product, of the second consumer: there is such a step, or nothing to be behind in.
  SK_DEVICE void fall_behind() {
    if (Config::kLag > 0 && steps_a_pass_ > Config::kLag) ptx::wait_for(pipeline_.full[Config::kLag], 0);
  }

  SK_DEVICE void multiply(Fragment<Config>& fragment) {
#pragma unroll
    for (int accumulator = 0; accumulator < Config::kAccumulators; ++accumulator) {
      auto& sum = fragment.sum[accumulator][0];
      int last = -1;  // the stage that products under way read
      const int steps = Passes::count(accumulator, inexact_) * steps_a_pass_;
#pragma unroll 1
      for (int step = 0; step < steps; ++step, turn_.next()) {
        ptx::wait_for(pipeline_.full[turn_.stage], turn_.parity);
        const Stage<Config>& stage = pipeline_.stages[turn_.stage];
        ptx::begin_products();
#pragma unroll
        for (int byte = 0; byte < Config::kRowBytes; byte += 32)
          ptx::multiply_add_async<typename Config::Element>(sum, ptx::matrix_descriptor(stage.rows + first_row_ + byte),
                                                            ptx::matrix_descriptor(stage.columns + byte),
                                                            step > 0 || byte > 0);
        ptx::commit_products();
        ptx::wait_for_products<1>(sum);
        if (last >= 0) release(last);
        last = turn_.stage;
      }
      ptx::wait_for_products<0>(sum);
      release(last);
    }
  }

 private:
  // Every warp for itself: what it waited for are its own products.
  SK_DEVICE void release(int stage) {
    if (ptx::lane_index() == 0) ptx::arrive(pipeline_.empty[stage]);
  }

  Pipeline<Config>& pipeline_;
  const bool inexact_;
  const int steps_a_pass_, first_row_;
  Turn<Config> turn_;
};

}  // namespace smartclip::cuda::sm90
