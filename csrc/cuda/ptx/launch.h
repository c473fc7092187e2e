// The only way to start a kernel, and what a kernel's declaration needs.
//
//   template <class Config> SK_KERNEL(Config::kThreads, 2) product(SK_PARAMETER Parameters p);
//   launch("product", product<Config>, {blocks, threads, shared_bytes}, stream, parameters);
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// At most kThreads threads a block, and at least kBlocks blocks on a multiprocessor: both bound the registers.
#define SK_KERNEL(kThreads, kBlocks) __global__ void __launch_bounds__(kThreads, kBlocks)
#define SK_PARAMETER const __grid_constant__

namespace smartclip::cuda {

using Stream = void*;  // a cudaStream_t

struct Shape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
};

inline void check(cudaError_t error, const char* call, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("smartclip_kernels: ") + call + ", launching " + kernel + ": " +
                             cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// On the current device. Does not wait, and may be captured into a graph.
template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), const Shape& shape, Stream stream, Parameters parameters) {
  const int bytes = static_cast<int>(shape.shared_bytes);
  constexpr int kWithoutAsking = 48 * 1024;
  if (bytes > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute",
          name);
  void* arguments[] = {&parameters};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(shape.blocks)),
                         dim3(shape.threads), arguments, shape.shared_bytes, static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel", name);
}

}  // namespace smartclip::cuda
