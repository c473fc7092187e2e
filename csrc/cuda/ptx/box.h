// Boxes of a matrix, copied to shared memory by an engine beside the threads (PTX ISA, "cp.async.bulk.tensor").
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "ptx/barrier.h"
#include "ptx/launch.h"

namespace smartclip::ptx {

// A matrix in global memory and the box that is copied of it. A kernel gets it as a parameter, and never a copy.
using TensorMap = CUtensorMap;

constexpr int kBoxRowBytes = 128;

// A function of the driver by way of the runtime: nothing is linked to the driver, which may not be there.
inline void* driver_function(const char* name, const char* needs) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  constexpr unsigned kSince = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, kSince, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  cuda::check(error, "cudaGetDriverEntryPoint", name);
  if (found != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("smartclip_kernels: there is no ") + name + " here; it needs " + needs);
  return function;
}

// Of (rows, depth) numbers of 2 bytes, whose rows start `stride` numbers apart, boxes of box_rows rows of 128 bytes of
// depth. What lies beyond the matrix becomes 0. In shared memory a box's rows follow one another, 128 bytes each, and
// chunk k of 16 bytes of row r is at chunk k ^ (r % 8): tile/layout.h, swizzled<128>. Addresses and strides are
// multiples of 16 bytes; a box's place in shared memory of 1,024.
template <class Element>
TensorMap tensor_map(const void* matrix, int64_t rows, int64_t depth, int64_t stride, int box_rows) {
  static_assert(sizeof(Element) == 2, "numbers of 2 bytes");
  constexpr auto kType =
      std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
      driver_function("cuTensorMapEncodeTiled", "a driver of CUDA 12"));
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(stride) * sizeof(Element)};
  const cuuint32_t box[] = {kBoxRowBytes / sizeof(Element), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encode(&map, kType, 2, const_cast<void*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("smartclip_kernels: cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

// prefetch.tensormap: a hint.
SK_DEVICE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory"); }

// cp.async.bulk.tensor.2d, by one thread: the box that begins at (row, depth), in numbers. The bytes of the whole box
// arrive at `barrier`, also of what lies beyond the matrix.
SK_DEVICE void copy_box(void* shared, const TensorMap& map, int depth, int row, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(depth), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

}  // namespace smartclip::ptx
