// mbarriers (PTX ISA, "mbarrier"), named barriers ("bar, barrier"), and who sleeps until one of them changes.
#include <cstring>

#include "state.h"

namespace smartclip::emulator {

void Launch::begin_engines() {
  barriers_.clear();
  boxes_.clear();
  sleepers_.clear();
  for (NamedBarrier& named : named_) named = {};
  const int count = threads_ / Warpgroup::kThreads;
  for (int k = 0; k < count; ++k) {
    warpgroups_[k].products.clear();
    warpgroups_[k].executed = warpgroups_[k].asking = warpgroups_[k].asked = 0;
    constexpr int kAll = 65536, kUnit = 8;
    warpgroups_[k].registers = kAll / threads_ / kUnit * kUnit;
  }
  async_view_.assign(shared_bytes_, kPoison);
}

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
  return found->second;
}

void Launch::init_barrier(unsigned char* address, int arrivals, Where where) {
  const auto refuse = [&](const std::string& what) { fail(Instruction::kInitBarrier, where, what); };
  if (!holds(address, 8) || (address - shared()) % 8 != 0) refuse("a barrier of 8 bytes at " + place(address));
  if (arrivals < 1 || arrivals >= 1 << 20) refuse(std::to_string(arrivals) + " arrivals");
  if (barriers_.count(address)) refuse("there is a barrier at " + place(address));
  Barrier& barrier = barriers_[address];
  barrier.arrivals = barrier.pending = arrivals;
  barrier.by = me().thread;
}

// What is in shared memory now is what engines see. Of barriers: those that this thread made.
void Launch::fence_async() {
  std::memcpy(async_view_.data(), shared(), shared_bytes_);
  for (auto& [address, barrier] : barriers_)
    if (barrier.by == me().thread) barrier.known = true;
}

void Launch::end_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.parity ^= 1;
  wake();
}

void Launch::arrive(unsigned char* address, int bytes, Where where) {
  Barrier& barrier = this->barrier(address, Instruction::kArrive, where);
  if (barrier.pending == 0) fail(Instruction::kArrive, where, "more arrivals than the barrier is for");
  if (bytes < 0) fail(Instruction::kArrive, where, std::to_string(bytes) + " bytes");
  if (bytes && !barrier.known)
    fail(Instruction::kArrive, where, "the copy engine does not know the barrier: no fence_async after init_barrier");
  barrier.order->release();
  me().sequence.renew();
  barrier.bytes += bytes;
  --barrier.pending;
  end_phase(barrier);
}

void Launch::wait_for(unsigned char* address, int parity, Where where) {
  Fibre& fibre = me();
  Barrier& barrier = this->barrier(address, Instruction::kWaitFor, where);
  if (parity != 0 && parity != 1) fail(Instruction::kWaitFor, where, "parity " + std::to_string(parity));
  stir(fibre);
  while (barrier.parity == parity) sleep(fibre, Instruction::kWaitFor, where);
  barrier.order->acquire();
  fibre.sequence.renew();
}

void Launch::sync_threads(int id, int threads, Where where) {
  Fibre& fibre = me();
  const auto refuse = [&](const std::string& what) { fail(Instruction::kSyncThreads, where, what); };
  if (id < 1 || id > 15) refuse("barrier " + std::to_string(id) + ", needs 1 to 15");
  if (threads < kWarp || threads % kWarp != 0 || threads > threads_)
    refuse(std::to_string(threads) + " threads, needs whole warps of the block");
  stir(fibre);
  NamedBarrier& named = named_[id];
  if (named.arrived && named.threads != threads)
    refuse(std::to_string(threads) + " threads, others wait for " + std::to_string(named.threads));
  named.threads = threads;
  // Two orders in turn, as in sync_block.
  tsan::Order& order = arena_->named[id][named.phase];
  order.release();
  if (++named.arrived < threads) {
    named.waiting.push_back(&fibre);
    park(fibre, Instruction::kSyncThreads, where);
  } else {
    named.arrived = 0;
    named.phase ^= 1;
    for (const Fibre* waiter : named.waiting) warps_[waiter->warp].runnable |= 1u << waiter->lane;
    named.waiting.clear();
    if (options_.order == Options::Order::kRandom) hand_over(fibre);
  }
  order.acquire();
  fibre.sequence.renew();
  stir(fibre);
}

// setmaxnreg: who asks for more waits until others have given enough.
void Launch::set_registers(int registers, bool more, Where where) {
  constexpr int kPool = 65536 / Warpgroup::kThreads;
  Fibre& fibre = me();
  Warpgroup& own = warpgroup();
  const auto refuse = [&](const std::string& what) { fail(Instruction::kRegisters, where, what); };
  if (registers < 24 || registers > 256 || registers % 8 != 0)
    refuse(std::to_string(registers) + " registers, needs a multiple of 8 from 24 to 256");
  if (more ? registers < own.registers : registers > own.registers)
    refuse(std::to_string(registers) + " registers, the warpgroup has " + std::to_string(own.registers));
  if (own.asked && own.asking != registers) refuse("the warpgroup is divided");
  own.asking = registers;
  if (++own.asked == Warpgroup::kThreads) wake();
  const auto granted = [&] {
    if (own.asked % Warpgroup::kThreads != 0) return false;
    int others = 0;
    for (int k = 0; k < threads_ / Warpgroup::kThreads; ++k)
      if (&warpgroups_[k] != &own) others += warpgroups_[k].registers;
    return others + registers <= kPool;
  };
  while (own.registers != registers && !granted()) sleep(fibre, Instruction::kRegisters, where);
  if (own.registers == registers) return;
  own.registers = registers;
  own.asked = 0;
  wake();
}

std::string Launch::unfinished_text() const {
  const std::string start = block_text() + ": it ended before ";
  if (!boxes_.empty()) return start + std::to_string(boxes_.size()) + " boxes had come";
  for (const auto& [address, barrier] : barriers_)
    if (barrier.bytes != 0)
      return start + std::to_string(barrier.bytes) + " bytes had come that the barrier at " + place(address) +
             " expects";
  for (int k = 0; k < threads_ / Warpgroup::kThreads; ++k)
    for (int lane = 0; lane < Warpgroup::kThreads; ++lane) {
      const Part& part = arena_->fibres[k * Warpgroup::kThreads + lane].part;
      if (part.delivered < part.issued)
        return start + "products of warpgroup " + std::to_string(k) + " were waited for";
    }
  return "";
}

void init_barrier(void* barrier, int arrivals, Where where) {
  launch->init_barrier(static_cast<unsigned char*>(barrier), arrivals, where);
}
void arrive(void* barrier, int bytes, Where where) {
  launch->arrive(static_cast<unsigned char*>(barrier), bytes, where);
}
void wait_for(void* barrier, int parity, Where where) {
  launch->wait_for(static_cast<unsigned char*>(barrier), parity, where);
}
void fence_async() { launch->fence_async(); }
void sync_threads(int barrier, int threads, Where where) { launch->sync_threads(barrier, threads, where); }
void set_registers(int registers, bool more, Where where) { launch->set_registers(registers, more, where); }

}  // namespace smartclip::emulator
