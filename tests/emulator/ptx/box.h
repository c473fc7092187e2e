// Twin of csrc/cuda/ptx/box.h. See ../boxes.cpp.
#pragma once

#include <stdexcept>
#include <string>

#include "ptx/barrier.h"
#include "ptx/launch.h"

namespace smartclip::ptx {

using TensorMap = emulator::TensorMap;

constexpr int kBoxRowBytes = TensorMap::kRowBytes;

// What the driver refuses is refused (CUDA Driver API, cuTensorMapEncodeTiled).
template <class Element>
TensorMap tensor_map(const void* matrix, int64_t rows, int64_t depth, int64_t stride, int box_rows) {
  static_assert(sizeof(Element) == 2, "numbers of 2 bytes");
  const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(Element));
  if (reinterpret_cast<uintptr_t>(matrix) % 16 != 0 || row_bytes % 16 != 0 || row_bytes >= int64_t(1) << 40 ||
      stride < depth || rows < 1 || depth < 1 || rows > int64_t(1) << 32 || depth > int64_t(1) << 32 || box_rows < 1 ||
      box_rows > 256)
    throw std::runtime_error("smartclip_kernels emulator: cuTensorMapEncodeTiled: rows " + std::to_string(rows) +
                             ", depth " + std::to_string(depth) + ", " + std::to_string(row_bytes) +
                             " bytes from row to row, boxes of " + std::to_string(box_rows) + " rows");
  return {matrix, rows, depth, stride, box_rows, {}};
}

SK_DEVICE void prefetch_map(const TensorMap&) {}

// PTX ISA, "cp.async.bulk.tensor": .2d, .mbarrier::complete_tx::bytes.
SK_DEVICE void copy_box(void* shared, const TensorMap& map, int depth, int row, Barrier& barrier, SK_HERE) {
  emulator::copy_box(shared, map, depth, row, &barrier, where);
}

}  // namespace smartclip::ptx
