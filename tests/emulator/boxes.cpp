// cp.async.bulk.tensor: boxes of a matrix, copied by an engine at any moment before their barrier's phase ends.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace smartclip::emulator {

void Launch::copy_box(Box box) {
  const auto refuse = [&](const std::string& what) { fail(Instruction::kCopyBox, box.where, what); };
  const size_t bytes = box.bytes();
  if (!holds(box.to, bytes)) refuse(std::to_string(bytes) + " bytes at " + place(box.to));
  if ((box.to - shared()) % kSharedAlignment != 0) refuse(place(box.to) + " is no multiple of 1024");
  if (!barrier(box.barrier, Instruction::kCopyBox, box.where).known)
    refuse("the copy engine does not know the barrier: no fence_async after init_barrier");
  if (!is_fenced(box.to, bytes)) refuse("threads wrote to " + place(box.to) + " without a fence_async after it");
  for (const Box& other : boxes_)
    if (box.to < other.to + other.bytes() && other.to < box.to + bytes)
      refuse("another box is under way to " + place(other.to));
  const int64_t first = box.to - shared(), end = first + static_cast<int64_t>(bytes);
  for (const Warpgroup& own : warpgroups_)
    for (int warp = 0; warp < Product::kWarps; ++warp)
      for (size_t k = own.executed[warp]; k < own.products.size(); ++k)
        if (own.products[k].issued[warp] && own.products[k].reads(warp, first, end))
          refuse("products under way read what is there: " + in_words(Instruction::kProduct, own.products[k].where));
  tsan::reads(box.barrier, sizeof(Barrier::kBits), box.site);
  Traces& traces = arena_->traces;
  traces.boxes.create("boxes of emulated block", 0);
  box.index = boxes_issued_++;
  traces.box_issued[box.index % Traces::kRing].release();
  me().sequence.renew();
  boxes_.push_back(std::move(box));
  if (options_.copies == Options::Copies::kEarliest) land_box(boxes_.size() - 1);
  stir(me());
}

// What lies beyond the matrix is 0.
void Launch::read_box(Box& box) {
  Traces& traces = arena_->traces;
  traces.boxes.enter();
  traces.box_issued[box.index % Traces::kRing].acquire();
  traces.boxes.renew();
  const TensorMap& map = box.map;
  constexpr int64_t kNumbers = TensorMap::kRowBytes / TensorMap::kNumberBytes;
  const int64_t first = std::clamp<int64_t>(-int64_t(box.depth), 0, kNumbers);
  const int64_t end = std::clamp<int64_t>(map.depth - box.depth, first, kNumbers);
  box.data.assign(box.bytes(), 0);
  for (int r = 0; r < map.box_rows && first < end; ++r) {
    const int64_t row = int64_t(box.row) + r;
    if (row < 0 || row >= map.rows) continue;
    const unsigned char* const from = static_cast<const unsigned char*>(map.matrix) +
                                      (row * map.stride + box.depth + first) * TensorMap::kNumberBytes;
    const size_t bytes = (end - first) * TensorMap::kNumberBytes;
    tsan::reads(from, bytes, box.site);
    std::memcpy(box.data.data() + r * TensorMap::kRowBytes + first * TensorMap::kNumberBytes, from, bytes);
  }
  me().sequence.enter();
}

// PTX ISA, "Tensor swizzling modes", 128 bytes: chunk k of 16 bytes is at chunk k ^ (address / 128 % 8).
void Launch::land_box(size_t index) {
  if (boxes_[index].data.empty()) read_box(boxes_[index]);
  const Box box = std::move(boxes_[index]);
  boxes_.erase(boxes_.begin() + static_cast<std::ptrdiff_t>(index));
  Barrier& barrier = barriers_.at(box.barrier);
  const tsan::Sequence& sequence = arena_->traces.boxes;
  sequence.enter();
  tsan::writes(box.to, box.bytes(), box.site);
  constexpr int kChunk = 16;
  for (size_t byte = 0; byte < box.bytes(); byte += kChunk) {
    const int64_t line = (box.to - shared() + byte) / TensorMap::kRowBytes;
    std::memcpy(box.to + (byte ^ line % 8 * kChunk), box.data.data() + byte, kChunk);
  }
  std::memcpy(async_view_.data() + (box.to - shared()), box.to, box.bytes());
  barrier.phase[barrier.parity].release();
  me().sequence.enter();
  barrier.bytes -= static_cast<int64_t>(box.bytes());
  end_phase(barrier);
}

bool Launch::advance() {
  if (boxes_.empty()) return false;
  if (options_.copies != Options::Copies::kRandom) {
    land_box(0);
    return true;
  }
  const size_t index = random(boxes_.size());
  if (boxes_[index].data.empty() && random(2) == 0)
    read_box(boxes_[index]);
  else
    land_box(index);
  return true;
}

void copy_box(void* shared, const TensorMap& map, int depth, int row, void* barrier, Where where) {
  launch->copy_box({static_cast<unsigned char*>(shared),
                    map,
                    depth,
                    row,
                    static_cast<unsigned char*>(barrier),
                    __builtin_return_address(0),
                    where,
                    0,
                    {}});
}

}  // namespace smartclip::emulator
