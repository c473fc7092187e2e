// Twin of csrc/cuda/ptx/launch.h: a launch has run when it returns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "emulator.h"

#define SK_KERNEL(kThreads, kBlocks) void
#define SK_PARAMETER const

namespace smartclip::cuda {

using Stream = void*;

struct Shape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
};

template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), const Shape& shape, Stream, Parameters parameters) {
  static_assert(std::is_trivially_copyable_v<Parameters>, "parameters reach a device as bytes");
  static_assert(sizeof(Parameters) <= 4096, "what a launch takes");
  struct Call {
    void (*kernel)(Parameters);
    const Parameters& parameters;
  } call{kernel, parameters};
  emulator::run(
      name, shape.blocks, shape.threads, shape.shared_bytes,
      [](const void* argument) {
        const Call& call = *static_cast<const Call*>(argument);
        call.kernel(call.parameters);
      },
      &call);
}

}  // namespace smartclip::cuda
