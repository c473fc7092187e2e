// Engines of a block from its beginning to its end; in between, see copies.cpp, boxes.cpp, warpgroups.cpp.
#include "engines.h"

#include "state.h"

namespace smartclip::emulator {

void Warpgroup::begin(int first_registers) {
  steps.clear();
  products.clear();
  groups.clear();
  for (int& of_warp : executed) of_warp = 0;
  registers = first_registers;
}

Registers& Part::of(float* c) {
  for (Registers& known : registers)
    if (known.c == c) return known;
  registers.emplace_back();
  registers.back().c = c;
  return registers.back();
}

tsan::Order* Traces::barrier(size_t index) {
  while (barriers.size() <= index) barriers.emplace_back();
  return barriers[index].data();
}

void Launch::begin_engines() {
  barriers_.clear();
  boxes_.clear();
  boxes_issued_ = 0;
  sleepers_.clear();
  for (NamedBarrier& named : named_) named = {};
  constexpr int kAll = 65536, kUnit = 8;
  for (Warpgroup& warpgroup : warpgroups_) warpgroup.begin(kAll / threads_ / kUnit * kUnit);
  async_view_.assign(shared_bytes_, kPoison);
}

// In random order any copy of the thread may be made now, wholly or as far as its reading; and any box, and the next
// products.
void Launch::stir_some(Fibre& fibre) {
  constexpr int kNow = 4;
  if (!boxes_.empty() && random(kNow) == 0) advance();
  stir_products();
  Engine& engine = *fibre.engine;
  for (int64_t i = engine.first; i < engine.end; ++i) {
    Copy& copy = engine.at(i);
    if (copy.landed || random(kNow) != 0) continue;
    if (!copy.was_read && random(2) == 0)
      read(fibre, copy);
    else
      land(fibre, copy);
  }
}

void Launch::finish_engines() {
  Traces& traces = arena_->traces;
  finish(traces.boxes);
  for (const Traces::OfWarp& products : traces.products) finish(products.sequence);
  main_sequence_.enter();
}

std::string Launch::unfinished_text() const {
  const std::string start = block_text() + ": it ended before ";
  if (!boxes_.empty())
    return start + "a box had come that nobody waits for: " + in_words(Instruction::kCopyBox, boxes_[0].where);
  for (const auto& [address, barrier] : barriers_)
    if (barrier.bytes != 0)
      return start + std::to_string(barrier.bytes) + " bytes had come that the barrier at " + place(address) +
             " expects";
  for (int t = 0; t < threads_; ++t) {
    const Part& part = arena_->fibres[t].part;
    if (part.done == part.issued) continue;
    const Product& product = warpgroups_[t / Warpgroup::kThreads].products[part.done];
    return start + "thread " + std::to_string(t) + " waited for " + in_words(Instruction::kProduct, product.where);
  }
  return "";
}

}  // namespace smartclip::emulator
