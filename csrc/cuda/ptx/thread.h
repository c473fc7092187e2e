// Who a thread is, and what the threads of a warp or a block do together. Blocks and grids have one dimension.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define SK_DEVICE __device__ __forceinline__

namespace smartclip::ptx {

constexpr int kWarp = 32;

SK_DEVICE int thread_index() { return threadIdx.x; }
SK_DEVICE int block_index() { return blockIdx.x; }
SK_DEVICE int lane_index() { return threadIdx.x % kWarp; }
SK_DEVICE int warp_index() { return threadIdx.x / kWarp; }

// bar.sync 0: all threads of the block arrive; what they wrote to memory before is seen by all of them after.
SK_DEVICE void sync_block() { __syncthreads(); }

// membar.gl and atom.global.add.u32 by one thread of each of the grid's blocks, on a count that begins at 0: whether it
// is the last of them. What the others' threads that called it wrote before is then seen, by its block after a barrier.
SK_DEVICE bool arrive_last(uint32_t* count) {
  __threadfence();
  const bool last = atomicAdd(count, 1u) == gridDim.x - 1;
  __threadfence();
  return last;
}

// bar.warp.sync by a whole warp: what its lanes wrote to memory before is seen by all of them after.
SK_DEVICE void sync_warp() { __syncwarp(); }

// No instruction: the compiler moves no access to memory across it, so that what is read anew needs no register
// meanwhile.
SK_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// x itself. No instruction: what follows from it is computed after this, not before a loop around it and kept in
// registers.
SK_DEVICE int computed_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// shfl.sync.bfly.b32 by a whole warp: the value of lane (own lane ^ mask).
SK_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
SK_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
SK_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
SK_DEVICE long long shuffle_xor(long long value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// vote.sync.any.pred by a whole warp.
SK_DEVICE bool any_in_warp(bool value) { return __any_sync(0xffffffffu, value); }

}  // namespace smartclip::ptx
