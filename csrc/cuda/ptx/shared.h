// Shared memory: the block's one object, and the asynchronous copies into it (PTX ISA, "cp.async").
#pragma once

#include "ptx/thread.h"

namespace smartclip::ptx {

// The block's shared memory as one T; the launch says how many bytes there are. Nothing in it is initialised.
template <class T>
SK_DEVICE T& shared_storage() {
  static_assert(alignof(T) <= 1024, "shared memory starts at a multiple of 1,024 bytes");
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

SK_DEVICE uint32_t shared_address(const void* generic) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(generic));
}

// cp.async.cg.shared.global, 16 bytes, both addresses multiples of 16. The first `bytes` (0 to 16) are read, the others
// become 0; with 0 nothing is read. Not there before the group that holds it was waited for, and a barrier passed.
SK_DEVICE void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// cp.async.commit_group: this thread's copies since the last one are a group, which may be empty.
SK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// cp.async.wait_group: until at most the kPending latest groups of this thread are under way.
template <int kPending>
SK_DEVICE void wait_for_copies() {
  static_assert(kPending >= 0, "a number of groups");
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

}  // namespace smartclip::ptx
