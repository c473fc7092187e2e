// mbarriers (PTX ISA, "mbarrier"), named barriers ("bar, barrier"), and who sleeps until one of them changes.
#include <cstring>

#include "state.h"

namespace smartclip::emulator {

void Launch::sleep(Fibre& fibre, Instruction instruction, Where where) {
  sleepers_.push_back(&fibre);
  park(fibre, instruction, where);
}

void Launch::wake() {
  for (const Fibre* fibre : sleepers_) warps_[fibre->warp].runnable |= 1u << fibre->lane;
  sleepers_.clear();
}

Barrier& Launch::barrier(unsigned char* address, Instruction instruction, Where where) {
  const auto found = barriers_.find(address);
  if (found == barriers_.end()) fail(instruction, where, "no barrier was initialised at " + place(address));
  if (std::memcmp(address, &Barrier::kBits, sizeof(Barrier::kBits)) != 0)
    fail(instruction, where, "something else was written over the barrier at " + place(address));
  return found->second;
}

void Launch::init_barrier(const void* site, unsigned char* address, int arrivals, Where where) {
  constexpr size_t kBytes = sizeof(Barrier::kBits);
  const auto refuse = [&](const std::string& what) { fail(Instruction::kInitBarrier, where, what); };
  if (!holds(address, kBytes) || (address - shared()) % kBytes != 0)
    refuse("a barrier of 8 bytes at " + place(address));
  if (arrivals < 1 || arrivals > Barrier::kMostArrivals) refuse(std::to_string(arrivals) + " arrivals");
  if (barriers_.count(address)) refuse("there is a barrier at " + place(address));
  tsan::Order* const phase = arena_->traces.barrier(barriers_.size());
  Barrier& barrier = barriers_[address];
  barrier.arrivals = barrier.pending = arrivals;
  barrier.by = me().thread;
  barrier.phase = phase;
  tsan::writes(address, kBytes, site);
  std::memcpy(address, &Barrier::kBits, kBytes);
}

// What is in shared memory now is what engines see. Of barriers: those that this thread made.
void Launch::fence_async() {
  std::memcpy(async_view_.data(), shared(), shared_bytes_);
  for (auto& [address, barrier] : barriers_)
    if (barrier.by == me().thread) barrier.known = true;
}

bool Launch::is_fenced(const unsigned char* first, size_t bytes) const {
  return std::memcmp(first, async_view_.data() + (first - shared()), bytes) == 0;
}

void Launch::end_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.parity ^= 1;
  wake();
}

void Launch::arrive(const void* site, unsigned char* address, int bytes, Where where) {
  Barrier& barrier = this->barrier(address, Instruction::kArrive, where);
  const auto refuse = [&](const std::string& what) { fail(Instruction::kArrive, where, what); };
  if (barrier.pending == 0) refuse("more arrivals than the barrier is for: " + std::to_string(barrier.arrivals));
  if (bytes < 0 || barrier.bytes + bytes > Barrier::kMostBytes) refuse(std::to_string(bytes) + " bytes more");
  if (bytes && !barrier.known) refuse("the copy engine does not know the barrier: no fence_async after init_barrier");
  tsan::reads(address, sizeof(Barrier::kBits), site);
  barrier.phase[barrier.parity].release();
  me().sequence.renew();
  barrier.bytes += bytes;
  --barrier.pending;
  end_phase(barrier);
}

void Launch::wait_for(const void* site, unsigned char* address, int parity, Where where) {
  Fibre& fibre = me();
  Barrier& barrier = this->barrier(address, Instruction::kWaitFor, where);
  if (parity != 0 && parity != 1) fail(Instruction::kWaitFor, where, "parity " + std::to_string(parity));
  tsan::reads(address, sizeof(Barrier::kBits), site);
  stir(fibre);
  fibre.barrier = address;
  fibre.number = parity;
  while (barrier.parity == parity) sleep(fibre, Instruction::kWaitFor, where);
  barrier.phase[parity].acquire();
  fibre.sequence.renew();
}

// What a phase that somebody waits for has not got.
std::string Launch::missing_text(unsigned char* address, int parity) const {
  const Barrier& barrier = barriers_.at(address);
  return ", parity " + std::to_string(parity) + " of the barrier at " + place(address) + ": " +
         std::to_string(barrier.pending) + " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing";
}

void Launch::sync_threads(int id, int threads, Where where) {
  Fibre& fibre = me();
  const auto refuse = [&](const std::string& what) { fail(Instruction::kSyncThreads, where, what); };
  if (id < 1 || id >= NamedBarrier::kCount) refuse("barrier " + std::to_string(id) + ", needs 1 to 15");
  if (threads < kWarp || threads % kWarp != 0 || threads > threads_)
    refuse(std::to_string(threads) + " threads, needs whole warps of the block");
  stir(fibre);
  NamedBarrier& named = named_[id];
  if (named.arrived && named.threads != threads)
    refuse(std::to_string(threads) + " threads, others wait for " + std::to_string(named.threads));
  named.threads = threads;
  named.lanes[fibre.warp] |= 1u << fibre.lane;
  // Two orders in turn, as in sync_block.
  tsan::Order& order = arena_->named[id][named.phase];
  order.release();
  if (++named.arrived < threads) {
    fibre.number = id;
    park(fibre, Instruction::kSyncThreads, where);
  } else {
    for (const uint32_t lanes : named.lanes)
      if (lanes != 0 && lanes != ~0u) refuse("a warp is divided: " + waiting_text());
    for (int w = 0; w < threads_ / kWarp; ++w) warps_[w].runnable |= named.lanes[w];
    named = {0, 0, named.phase ^ 1, {}};
    if (options_.order == Options::Order::kRandom) hand_over(fibre);
  }
  order.acquire();
  fibre.sequence.renew();
  stir(fibre);
}

void init_barrier(void* barrier, int arrivals, Where where) {
  launch->init_barrier(__builtin_return_address(0), static_cast<unsigned char*>(barrier), arrivals, where);
}
void arrive(void* barrier, int bytes, Where where) {
  launch->arrive(__builtin_return_address(0), static_cast<unsigned char*>(barrier), bytes, where);
}
void wait_for(void* barrier, int parity, Where where) {
  launch->wait_for(__builtin_return_address(0), static_cast<unsigned char*>(barrier), parity, where);
}
void fence_async() { launch->fence_async(); }
void sync_threads(int barrier, int threads, Where where) { launch->sync_threads(barrier, threads, where); }

}  // namespace smartclip::emulator
