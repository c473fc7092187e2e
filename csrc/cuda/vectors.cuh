// What is done once for every row or column: partial states merged, anchors made ready, a unit for half precision.
#pragma once

#include "kernels.h"
#include "ptx/launch.h"
#include "ptx/shared.h"
#include "tile/reduce.h"

namespace smartclip::cuda {

constexpr int kVectorThreads = 128;

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

// Merges the blocks' states in their order into the side's. The losses are those of what has been merged so far.
template <class Objective>
SK_KERNEL(kVectorThreads, 1)
gather(SK_PARAMETER Gather p) {
  using State = typename Objective::template State<float>;
  const int index = ptx::block_index() * kVectorThreads + ptx::thread_index();
  if (index >= p.count) return;
  float* const into = p.side.statistics + p.start + index;
  State state = p.first ? State::empty() : load_planes<State>(into, p.side.size);
  const int64_t plane = int64_t(p.blocks) * p.count;
  for (int block = 0; block < p.blocks; ++block)
    state.merge(load_planes<State>(p.partials + int64_t(block) * p.count + index, plane));
  store_planes(into, p.side.size, state);
  p.side.loss[p.start + index] = Objective::loss(state, p.smoothing);
}

template <class Objective>
SK_KERNEL(kVectorThreads, 1)
anchors(SK_PARAMETER Anchors p) {
  using State = typename Objective::template State<float>;
  const int64_t index = int64_t(ptx::block_index()) * kVectorThreads + ptx::thread_index();
  if (index >= p.side.size) return;
  State state = State::empty();
  if constexpr (Objective::kNeedsStatistics) state = load_planes<State>(p.side.statistics + index, p.side.size);
  float numbers[Objective::kAnchor];
  Objective::anchor(state, p.side.weight[index] / (p.unit ? *p.unit : 1.0f), p.smoothing, numbers);
#pragma unroll
  for (int k = 0; k < Objective::kAnchor; ++k) p.side.anchor[k * p.side.size + index] = numbers[k];
}

// The power of two that brings the largest of |x| into [1, 2), over `room`; 1 where that is 0 or not finite. One block.
constexpr int kUnitThreads = 1024;

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
  if (thread == 0) {
    const float all = ptx::bits_to_float(bits);
    const bool ordinary = all >= 1e-36f && all <= 1e36f;
    *p.unit = (ordinary ? ptx::bits_to_float(bits & 0x7f800000u) : 1.0f) / p.room;
  }
}

inline int64_t blocks_of(int64_t count) { return (count + kVectorThreads - 1) / kVectorThreads; }

}  // namespace smartclip::cuda
