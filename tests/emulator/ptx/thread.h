// Twin of csrc/cuda/ptx/thread.h: the same functions on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "emulator.h"

// As forced as on the device: a wrapper that is shared by its callers would hide which of them a lane came from.
#define SK_DEVICE inline __attribute__((always_inline))

namespace smartclip::ptx {

constexpr int kWarp = 32;

SK_DEVICE int thread_index() { return emulator::identity->thread; }
SK_DEVICE int block_index() { return static_cast<int>(emulator::identity->block); }
SK_DEVICE int lane_index() { return emulator::identity->lane; }
SK_DEVICE int warp_index() { return emulator::identity->warp; }

// PTX ISA, "bar, barrier": bar.sync 0.
SK_DEVICE void sync_block(SK_HERE) { emulator::sync_block(where); }

// PTX ISA, "membar" and "atom".
SK_DEVICE bool arrive_last(uint32_t* count) {
  return __atomic_fetch_add(count, 1u, __ATOMIC_ACQ_REL) == static_cast<uint32_t>(emulator::block_count()) - 1;
}

// PTX ISA, "bar.warp.sync".
SK_DEVICE void sync_warp(SK_HERE) { emulator::sync_warp(where); }

SK_DEVICE int computed_here(int x) { return x; }

SK_DEVICE void keep_order() { asm volatile("" ::: "memory"); }

// PTX ISA, "shfl.sync": .bfly, c = 0x1f; wider values go in two halves by the same lanes. Orders no memory.
template <class T>
SK_DEVICE T shuffle_xor_bits(T value, int mask, emulator::Where where) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle_xor(bits, mask, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
SK_DEVICE float shuffle_xor(float value, int mask, SK_HERE) { return shuffle_xor_bits(value, mask, where); }
SK_DEVICE uint32_t shuffle_xor(uint32_t value, int mask, SK_HERE) { return shuffle_xor_bits(value, mask, where); }
SK_DEVICE double shuffle_xor(double value, int mask, SK_HERE) { return shuffle_xor_bits(value, mask, where); }
SK_DEVICE long long shuffle_xor(long long value, int mask, SK_HERE) { return shuffle_xor_bits(value, mask, where); }

// PTX ISA, "vote.sync": .any. Orders no memory.
SK_DEVICE bool any_in_warp(bool value, SK_HERE) { return emulator::any_in_warp(value, where); }

}  // namespace smartclip::ptx
