// Twin of csrc/cuda/ptx/barrier.h. A barrier is known by its address; see ../barriers.cpp.
#pragma once

#include "ptx/shared.h"

namespace smartclip::ptx {

struct Barrier {
  alignas(8) uint64_t bits;
};

// PTX ISA, "mbarrier.init".
SK_DEVICE void init_barrier(Barrier& barrier, int arrivals, SK_HERE) {
  emulator::init_barrier(&barrier, arrivals, where);
}

// PTX ISA, "mbarrier.arrive".
SK_DEVICE void arrive(Barrier& barrier, SK_HERE) { emulator::arrive(&barrier, 0, where); }
SK_DEVICE void arrive_expecting(Barrier& barrier, int bytes, SK_HERE) { emulator::arrive(&barrier, bytes, where); }

// PTX ISA, "mbarrier.test_wait, mbarrier.try_wait": .parity.
SK_DEVICE void wait_for(Barrier& barrier, int parity, SK_HERE) { emulator::wait_for(&barrier, parity, where); }

// PTX ISA, "fence.proxy.async".
SK_DEVICE void fence_async() { emulator::fence_async(); }

// PTX ISA, "bar, barrier": bar.sync.
SK_DEVICE void sync_threads(int barrier, int threads, SK_HERE) { emulator::sync_threads(barrier, threads, where); }

}  // namespace smartclip::ptx
