// Twin of csrc/cuda/ptx/shared.h: the block's shared memory lies between guard pages and is full of NaN when a block
// begins.
#pragma once

#include "ptx/thread.h"

namespace smartclip::ptx {

template <class T>
SK_DEVICE T& shared_storage(SK_HERE) {
  static_assert(alignof(T) <= 1024, "shared memory starts at a multiple of 1,024 bytes");
  return *static_cast<T*>(emulator::shared_storage(sizeof(T), where));
}

// From the start of the block's shared memory.
SK_DEVICE uint32_t shared_address(const void* generic, SK_HERE) { return emulator::shared_address(generic, where); }

// PTX ISA, "cp.async": .cg, cp-size 16, src-size `bytes`.
SK_DEVICE void copy_async_16(void* shared, const void* global, int bytes, SK_HERE) {
  emulator::copy_async_16(shared, global, bytes, where);
}

// PTX ISA, "cp.async.commit_group".
SK_DEVICE void commit_copies() { emulator::commit_copies(); }

// PTX ISA, "cp.async.wait_group".
template <int kPending>
SK_DEVICE void wait_for_copies() {
  static_assert(kPending >= 0, "a number of groups");
  emulator::wait_for_copies(kPending);
}

}  // namespace smartclip::ptx
