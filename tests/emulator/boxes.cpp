// cp.async.bulk.tensor: boxes of a matrix, copied by an engine at any moment before their barrier's phase ends.
#include <cstring>

#include "state.h"

namespace smartclip::emulator {

namespace {

constexpr int kRowBytes = 128, kChunkBytes = 16, kNumberBytes = 2;

}  // namespace

void Launch::copy_box(const void* site, const Box& box, Where where) {
  const auto refuse = [&](const std::string& what) { fail(Instruction::kCopyBox, where, what); };
  const size_t bytes = static_cast<size_t>(box.map.box_rows) * kRowBytes;
  if (!holds(box.to, bytes)) refuse(std::to_string(bytes) + " bytes at " + place(box.to));
  if ((box.to - shared()) % kSharedAlignment != 0) refuse(place(box.to) + " is no multiple of 1024");
  if (!barrier(box.barrier, Instruction::kCopyBox, where).known)
    refuse("the copy engine does not know the barrier: no fence_async after init_barrier");
  copier_.create("boxes of emulated block", 0);
  copies_issued_.release();
  me().sequence.renew();
  boxes_.push_back(box);
  boxes_.back().site = site;
  if (options_.copies == Options::Copies::kEarliest) land_box(boxes_.size() - 1);
  stir(me());
}

// PTX ISA, "Tensor swizzling modes", 128 bytes: chunk k of 16 bytes is at chunk k ^ (address / 128 % 8). What lies
// beyond the matrix is 0.
void Launch::land_box(size_t index) {
  const Box box = boxes_[index];
  boxes_.erase(boxes_.begin() + static_cast<std::ptrdiff_t>(index));
  copier_.enter();
  copies_issued_.acquire();
  copier_.renew();
  const char* const matrix = static_cast<const char*>(box.map.matrix);
  constexpr int kNumbers = kChunkBytes / kNumberBytes;
  for (int r = 0; r < box.map.box_rows; ++r)
    for (int chunk = 0; chunk < kRowBytes / kChunkBytes; ++chunk) {
      unsigned char data[kChunkBytes] = {};
      const int64_t row = int64_t(box.row) + r, first = int64_t(box.depth) + chunk * kNumbers;
      for (int i = 0; i < kNumbers; ++i)
        if (row >= 0 && row < box.map.rows && first + i >= 0 && first + i < box.map.depth) {
          const char* const from = matrix + (row * box.map.stride + first + i) * kNumberBytes;
          tsan::reads(from, kNumberBytes, box.site);
          std::memcpy(data + i * kNumberBytes, from, kNumberBytes);
        }
      unsigned char* const line = box.to + r * kRowBytes;
      const int64_t turn = (line - shared()) / kRowBytes % 8;
      unsigned char* const to = line + (chunk ^ turn) * kChunkBytes;
      tsan::writes(to, kChunkBytes, box.site);
      std::memcpy(to, data, kChunkBytes);
      std::memcpy(async_view_.data() + (to - shared()), data, kChunkBytes);
    }
  Barrier& barrier = barriers_.at(box.barrier);
  barrier.order->release();
  me().sequence.enter();
  barrier.bytes -= int64_t(box.map.box_rows) * kRowBytes;
  end_phase(barrier);
}

bool Launch::advance() {
  if (boxes_.empty()) return false;
  land_box(options_.copies == Options::Copies::kRandom ? random(boxes_.size()) : 0);
  return true;
}

void copy_box(void* shared, const TensorMap& map, int depth, int row, void* barrier, Where where) {
  launch->copy_box(
      __builtin_return_address(0),
      {static_cast<unsigned char*>(shared), map, depth, row, static_cast<unsigned char*>(barrier), nullptr}, where);
}

}  // namespace smartclip::emulator
