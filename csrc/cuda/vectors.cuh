// What is done once for every row or column: partial states merged into losses, anchors made ready, a unit for half
// precision.
#pragma once

#include "kernels.h"
#include "ptx/launch.h"
#include "ptx/shared.h"
#include "tile/reduce.h"

namespace smartclip::cuda {

template <class State>
SK_DEVICE State load_planes(const float* from, int64_t plane) {
  State state;
  float* const numbers = reinterpret_cast<float*>(&state);
#pragma unroll
  for (int k = 0; k < int(sizeof(State) / sizeof(float)); ++k) numbers[k] = from[k * plane];
  return state;
}

template <class State>
SK_DEVICE void store_planes(float* out, int64_t plane, const State& state) {
  const float* const numbers = reinterpret_cast<const float*>(&state);
#pragma unroll
  for (int k = 0; k < int(sizeof(State) / sizeof(float)); ++k) out[k * plane] = numbers[k];
}

SK_HOST_DEVICE int64_t blocks_of(int64_t count) { return (count + kVectorThreads - 1) / kVectorThreads; }

// Of a block's threads, in a fixed order. All of them get it.
template <int kThreads>
SK_DEVICE double block_sum(double x, double (&warps)[kThreads / ptx::kWarp]) {
  x = Lanes<1, ptx::kWarp>::sum(x);
  ptx::sync_block();  // what is here of a sum before has been read
  if (ptx::lane_index() == 0) warps[ptx::warp_index()] = x;
  ptx::sync_block();
  double sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / ptx::kWarp; ++warp) sum += warps[warp];
  return sum;
}

struct GatherShared {
  double warps[kVectorThreads / ptx::kWarp];
  bool last;
};

// Merges the slots' states in their order into one of the side's, and makes the loss of what has been merged so far.
template <class Objective>
SK_DEVICE void merge_states(const Gather& p, const Side<float>& side, const Partials& partials, int index,
                            LossSum& sum) {
  using State = typename Objective::template State<float>;
  if (index >= partials.count) return;
  float* const into = side.statistics + partials.start + index;
  State state = partials.first ? State::empty() : load_planes<State>(into, side.size);
  const int64_t plane = int64_t(partials.slots) * partials.count;
  for (int slot = 0; slot < partials.slots; ++slot)
    state.merge(load_planes<State>(partials.states + int64_t(slot) * partials.count + index, plane));
  store_planes(into, side.size, state);
  const int64_t anchor = partials.start + index;
  const float loss = Objective::loss(state, side.target_of(anchor, p.smoothing, p.scale, p.bias));
  side.loss[anchor] = loss;
  sum = {loss, Objective::is_anchor(state) ? 1.0 : 0.0};
}

SK_DEVICE LossSum sum_of(const LossSum* sums, int64_t count, double (&warps)[kVectorThreads / ptx::kWarp]) {
  LossSum sum{};
  for (int64_t k = ptx::thread_index(); k < count; k += kVectorThreads) {
    sum.loss += sums[k].loss;
    sum.anchors += sums[k].anchors;
  }
  return {block_sum<kVectorThreads>(sum.loss, warps), block_sum<kVectorThreads>(sum.anchors, warps)};
}

// The mean or the sum of a side's losses; a share of each where both sides have them. By the last block.
template <class Objective>
SK_DEVICE void reduce_losses(const Gather& p, GatherShared& shared) {
  const int64_t row_sums = blocks_of(p.row.size);
  double loss = 0;
  const auto add = [&](int side, const LossSum& sum) {
    const double count = p.reduction == Reduction::kMean && sum.anchors > 0 ? sum.anchors : 1.0;
    const double weight = (Objective::kBothSides ? p.shares[side] : 1.0) / count;
    if (weight != 0) loss += weight * sum.loss;  // not 0 * infinity
    if (ptx::thread_index() == 0) p.weights[side] = static_cast<float>(weight);
  };
  add(0, sum_of(p.sums, row_sums, shared.warps));
  if constexpr (Objective::kBothSides) add(1, sum_of(p.sums + row_sums, blocks_of(p.column.size), shared.warps));
  if (ptx::thread_index() == 0) *p.loss = static_cast<float>(loss);
}

template <class Objective>
SK_KERNEL(kVectorThreads, 1)
gather(SK_PARAMETER Gather p) {
  auto& shared = ptx::shared_storage<GatherShared>();
  const int row_blocks = static_cast<int>(blocks_of(p.row_partials.count));
  const bool of_column = ptx::block_index() >= row_blocks;
  const int block = ptx::block_index() - (of_column ? row_blocks : 0);
  const Partials& partials = of_column ? p.column_partials : p.row_partials;
  LossSum own{};
  merge_states<Objective>(p, of_column ? p.column : p.row, partials, block * kVectorThreads + ptx::thread_index(), own);
  if (!p.sums) return;
  own = {block_sum<kVectorThreads>(own.loss, shared.warps), block_sum<kVectorThreads>(own.anchors, shared.warps)};
  if (ptx::thread_index() == 0) {
    p.sums[(of_column ? blocks_of(p.row.size) : 0) + partials.start / kVectorThreads + block] = own;
    shared.last = p.loss && ptx::arrive_last(p.arrived);
  }
  ptx::sync_block();
  if (shared.last) reduce_losses<Objective>(p, shared);
}

// The power of two that brings `largest` into [1, 2), over `room`; where that is 0 or not finite, as if it was 1.
SK_DEVICE float unit_for(float largest, float room) {
  const bool ordinary = largest >= 1e-36f && largest <= 1e36f;
  return (ordinary ? ptx::bits_to_float(ptx::float_to_bits(largest) & 0x7f800000u) : 1.0f) / room;
}

template <class Objective>
SK_KERNEL(kVectorThreads, 1)
anchors(SK_PARAMETER Anchors p) {
  using State = typename Objective::template State<float>;
  const int row_blocks = static_cast<int>(blocks_of(p.row.size));
  const bool of_column = ptx::block_index() >= row_blocks;
  const Side<float>& side = of_column ? p.column : p.row;
  const int64_t index =
      int64_t(ptx::block_index() - (of_column ? row_blocks : 0)) * kVectorThreads + ptx::thread_index();
  float unit = 1;
  if (p.unit && p.uniform) {
    const float row = fabsf(*p.row.weight), column = p.column.size ? fabsf(*p.column.weight) : 0.0f;
    unit = unit_for(row != row || row > column ? row : column, p.room);
    if (ptx::block_index() == 0 && ptx::thread_index() == 0) *p.unit = unit, *p.gain = *p.scale * unit;
  } else if (p.unit) {
    unit = *p.unit;
  }
  if (index >= side.size) return;
  State state = State::empty();
  if constexpr (Objective::kNeedsStatistics) state = load_planes<State>(side.statistics + index, side.size);
  float numbers[Objective::kAnchor];
  Objective::anchor(state, side.weight[p.uniform ? 0 : index] / unit,
                    side.target_of(index, p.smoothing, p.scale, p.bias), numbers);
#pragma unroll
  for (int k = 0; k < Objective::kAnchor; ++k) side.anchor[k * side.size + index] = numbers[k];
}

constexpr int kOneBlock = 1024;  // threads of what is one block

// Of the largest of |x|; NaN is larger than all.
template <int kThreads>
SK_KERNEL(kThreads, 1)
unit(SK_PARAMETER Unit p) {
  auto& warps = ptx::shared_storage<float[kThreads / 32]>();
  const int thread = ptx::thread_index();
  float top = 0;
  for (int k = 0; k < 2; ++k)
    for (int64_t i = thread; i < p.size[k]; i += kThreads) {
      const float x = fabsf(p.x[k][i]);
      top = x > top || x != x ? x : top;
    }
  // The bits of numbers that are not negative are in their order, and those of NaN beyond all.
  const auto largest = [](float x) { return Lanes<1, 32>::max(ptx::float_to_bits(x)); };
  uint32_t bits = largest(top);
  if (ptx::lane_index() == 0) warps[ptx::warp_index()] = ptx::bits_to_float(bits);
  ptx::sync_block();
  bits = largest(warps[ptx::lane_index()]);
  if (thread != 0) return;
  const float unit = unit_for(ptx::bits_to_float(bits), p.room);
  *p.unit = unit;
  if (p.gain) *p.gain = *p.scale * unit;
}

// dL/dscale and dL/dbias, from the sums that blocks left.
template <int kThreads>
SK_KERNEL(kThreads, 1)
parameter_gradient(SK_PARAMETER ParameterGradient p) {
  auto& warps = ptx::shared_storage<double[kThreads / 32]>();
  double scale = 0, bias = 0;
  for (int64_t k = ptx::thread_index(); k < p.count; k += kThreads) {
    scale += p.sums[2 * k];
    bias += p.sums[2 * k + 1];
  }
  scale = block_sum<kThreads>(scale, warps);
  bias = block_sum<kThreads>(bias, warps);
  const double unit = p.unit ? *p.unit : 1.0;
  if (ptx::thread_index() != 0) return;
  if (p.scale) *p.scale = static_cast<float>(scale * unit);
  if (p.bias) *p.bias = static_cast<float>(bias * unit);
}

}  // namespace smartclip::cuda
