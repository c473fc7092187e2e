// Barriers in shared memory that threads and the copy engine arrive at (PTX ISA, "mbarrier"), named barriers, and the
// fence between what threads write and what engines read.
#pragma once

#include "ptx/shared.h"

namespace smartclip::ptx {

// An mbarrier. A phase ends once all arrivals that it was initialised for have come, and all bytes that they expect;
// phases have parities 0, 1, 0, …
struct Barrier {
  alignas(8) uint64_t bits;
};

// mbarrier.init.shared::cta.b64, by one thread. Before others, or the copy engine, use it: fence_async by that thread,
// then a barrier of the block.
SK_DEVICE void init_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// mbarrier.arrive.release.cta: what this thread did before is seen by who waits for the phase.
SK_DEVICE void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&barrier)) : "memory");
}

// mbarrier.arrive.expect_tx: the phase also waits for so many bytes of the copy engine.
SK_DEVICE void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity.acquire, until the phase of that parity has ended. Of a barrier that no phase has ended of,
// parity 1 has.
SK_DEVICE void wait_for(Barrier& barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// fence.proxy.async.shared::cta: what this thread wrote to shared memory is seen by the engines (copy, matrix) that a
// barrier after this lets begin.
SK_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// bar.sync: `threads` threads, whole warps, arrive at named barrier 1 to 15; then as sync_block.
SK_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace smartclip::ptx
