// Blocks one after another, and in each of them the fibres: who runs next, who waits for whom.
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "state.h"

namespace smartclip::emulator {

SK_THREAD_LOCAL const Identity* identity = nullptr;
SK_THREAD_LOCAL Launch* launch = nullptr;

namespace {

constexpr size_t kStack = 128 * 1024, kSlot = kStack + Pages::kPage, kGuard = 1 << 20;

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Stores of its own, for ThreadSanitizer would see memset.
void poison(unsigned char* from, const unsigned char* to) {
  for (; from < to; from += sizeof(uint64_t))
    *reinterpret_cast<volatile uint64_t*>(from) = kPoison * 0x0101010101010101u;
}

// Few bytes of the thread's own: a library that is loaded late has no room for more.
Arena* arenas() {
  static thread_local std::unique_ptr<Arena[]> kept;
  if (!kept) kept = std::make_unique<Arena[]>(2);
  return kept.get();
}

}  // namespace

void Arena::reserve(int threads, size_t shared_bytes) {
  constexpr size_t kShared = (kMostShared + Pages::kPage - 1) / Pages::kPage * Pages::kPage;
  if (!stacks.base()) {
    stacks = Pages(kSlot * kMostThreads + Pages::kPage);
    shared = Pages(kGuard + kShared + kGuard);
  }
  if (!fibres) fibres = std::make_unique<Fibre[]>(kMostThreads);
  for (; made < threads; ++made) {
    const int t = made;
    stacks.open(kSlot * t + Pages::kPage, kStack);
    Fibre& fibre = fibres[t];
    fibre.engine = std::make_unique<Engine>();
    fibre.thread = t, fibre.warp = t / kWarp, fibre.lane = t % kWarp;
    fibre.sequence.create("emulated thread", t);
  }
  const size_t wanted = rounded(shared_bytes, Pages::kPage);
  if (wanted != open) {
    shared.close();
    shared.open(kGuard + kShared - wanted, wanted);
    open = wanted;
  }
}

// Not all at the same place of a page: one line of each of 32 stacks would fill one set of the cache.
char* Arena::stack_top(int thread) const { return stacks.base() + kSlot * (thread + 1) - thread % kWarp * 832; }

unsigned char* Arena::shared_end() const {
  return reinterpret_cast<unsigned char*>(shared.base() + shared.size() - kGuard);
}

Launch::Launch(const char* name, int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*),
               const void* argument)
    : name_(name),
      blocks_(blocks),
      threads_(threads),
      shared_bytes_(shared_bytes),
      body_(body),
      argument_(argument),
      random_(options_.seed) {
  const auto need = [&](bool fine, const std::string& what) {
    if (!fine) throw std::runtime_error(std::string("smartclip_kernels emulator: kernel '") + name + "': " + what);
  };
  need(launch == nullptr, "a kernel does not launch another");
  need(blocks >= 1 && blocks < int64_t(1) << 31, std::to_string(blocks) + " blocks, needs 1 to 2147483647");
  need(threads >= 1 && threads <= kMostThreads && threads % kWarp == 0,
       std::to_string(threads) + " threads, needs a multiple of 32 up to 1024");
  need(shared_bytes <= kMostShared,
       std::to_string(shared_bytes) + " bytes of shared memory, there are " + std::to_string(kMostShared));
  launch = this;
}

Launch::~Launch() { launch = nullptr; }

void Launch::run() {
  main_sequence_.current();
  install_fault_handler();
  begin_.release();
  // A random order of so many blocks that none could be drawn by lot: a step that meets all of them.
  const bool shuffled = options_.order == Options::Order::kRandom;
  int64_t step = shuffled ? 1 + static_cast<int64_t>(random(blocks_)) : 1;
  while (std::gcd(step, blocks_) != 1) ++step;
  int64_t block = shuffled ? static_cast<int64_t>(random(blocks_)) : 0;
  for (int64_t i = 0; i < blocks_ && error_.empty(); ++i, block = (block + step) % blocks_) {
    arena_ = &arenas()[tsan::on() ? i % 2 : 0];
    run_block(options_.order == Options::Order::kReverse ? blocks_ - 1 - block : block);
  }
  end_.acquire();
  if (!error_.empty()) throw std::runtime_error(error_);
}

void Launch::run_block(int64_t block) {
  block_ = block;
  arena_->reserve(threads_, shared_bytes_);
  poison(arena_->shared_end() - arena_->open, arena_->shared_end());
  at_barrier_ = exited_ = phase_ = 0;
  begin_engines();
  for (int t = 0; t < threads_; ++t) {
    Fibre& fibre = arena_->fibres[t];
    fibre.block = block;
    fibre.part = {};
    fibre.engine->first = fibre.engine->end = fibre.engine->group = 0;
    prepare(fibre.context, arena_->stack_top(t), kStack / 2, enter);
    if (fibre.lane == 0) warps_[fibre.warp] = {~0u};
  }
  for (int w = threads_ / kWarp; w < kMostThreads / kWarp; ++w) warps_[w] = {};
  go(main_, *next(nullptr));
  identity = nullptr;
  finish_engines();
  ++arena_->blocks;
  if (fault_signal_) {
    pthread_sigmask(SIG_SETMASK, &fault_mask_, nullptr);
    error_ = fault_text();
  }
  if (error_.empty()) error_ = unfinished_text();
  if (error_.empty()) error_ = edge_text();
  if (!error_.empty()) abandon();
}

// Fibres stand in the middle of the kernel; new ones are made next time.
void Launch::abandon() {
  for (int t = 0; t < threads_; ++t) finish(arena_->fibres[t]);
  main_sequence_.enter();
  end_.acquire();
  arena_->fibres.reset();
  arena_->made = 0;
}

void Launch::enter() {
  Launch& self = *launch;
  self.begin_.acquire();
  self.arena_->end[self.arena_->blocks % 2].acquire();
  me().sequence.renew();
  std::string error;
  try {
    self.body_(self.argument_);
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  if (!error.empty()) self.stop(self.thread_text(me()) + error);
  self.leave();
}

void Launch::leave() {
  Fibre& fibre = me();
  warps_[fibre.warp].exited |= 1u << fibre.lane;
  warps_[fibre.warp].runnable &= ~(1u << fibre.lane);
  finish(fibre);
  if (++exited_ < threads_) hand_over(fibre);
  main_sequence_.enter();
  change(fibre.context, main_);
}

// What a thread and its copies did is before the arena's next block, and before the launch's end.
void Launch::finish(const tsan::Sequence& sequence) {
  if (!sequence.exists()) return;
  sequence.enter();
  arena_->end[(arena_->blocks + 1) % 2].release();
  end_.release();
}

void Launch::finish(Fibre& fibre) {
  finish(fibre.engine->sequence);
  finish(fibre.sequence);
}

void Launch::go(Context& from, Fibre& to) {
  identity = &to;
  to.sequence.enter();
  change(from, to.context);
}

// In `set`, which is not empty, the one to go on with after `from`.
int Launch::choose(uint32_t set, int from) {
  switch (options_.order) {
    case Options::Order::kAscending: {
      const uint32_t above = set & ~((2u << from) - 1);
      return __builtin_ctz(above ? above : set);
    }
    case Options::Order::kReverse: {
      const uint32_t below = set & ((1u << from) - 1);
      return 31 - __builtin_clz(below ? below : set);
    }
    case Options::Order::kRandom:
      for (uint64_t skip = random(__builtin_popcount(set)); skip; --skip) set &= set - 1;
  }
  return __builtin_ctz(set);
}

// A warp runs as far as it can, as if in lockstep, before the next one does; in random order any may. Null: nobody can.
Fibre* Launch::next(const Fibre* from) {
  const int end = options_.order == Options::Order::kReverse ? 0 : kWarp - 1;
  if (from && warps_[from->warp].runnable && options_.order != Options::Order::kRandom)
    return fibre(from->warp, choose(warps_[from->warp].runnable, from->lane));
  uint32_t ready = 0;
  for (int w = 0; w < threads_ / kWarp; ++w) ready |= uint32_t(warps_[w].runnable != 0) << w;
  if (!ready) return nullptr;
  const int warp = choose(ready, from ? from->warp : end);
  return fibre(warp, choose(warps_[warp].runnable, end));
}

void Launch::hand_over(Fibre& fibre) {
  Fibre* to = next(&fibre);
  while (!to && advance()) to = next(&fibre);
  if (!to) stop(block_text() + ": nobody can go on: " + waiting_text());
  if (to != &fibre) go(fibre.context, *to);
}

void Launch::park(Fibre& fibre, Instruction instruction, Where where) {
  fibre.instruction = instruction;
  fibre.where = where;
  warps_[fibre.warp].runnable &= ~(1u << fibre.lane);
  hand_over(fibre);
}

// The last lane to come does the work of all.
void Launch::meet(Instruction instruction, const void* site, Where where, Operands& operands) {
  Fibre& fibre = me();
  Warp& warp = warps_[fibre.warp];
  stir(fibre);
  if (!warp.arrived) {
    warp.instruction = instruction;
    warp.site = site;
  } else if (warp.instruction != instruction || warp.site != site) {
    fail(instruction, where, "the warp is divided: " + waiting_text());
  }
  warp.operands[fibre.lane] = &operands;
  warp.arrived |= 1u << fibre.lane;
  if (warp.arrived != ~0u) {
    park(fibre, instruction, where);
  } else {
    warp.arrived = 0;
    perform(instruction, warp.operands);
    warp.runnable = ~0u;
    if (options_.order == Options::Order::kRandom) hand_over(fibre);
  }
  stir(fibre);
}

void Launch::sync_block(const void* site, Where where) {
  Fibre& fibre = me();
  stir(fibre);
  if (at_barrier_ && barrier_site_ != site)
    fail(Instruction::kSyncBlock, where, "the block is divided: " + waiting_text());
  barrier_site_ = site;
  // Two in turn: who is late to leave one must not see what was done before the next.
  tsan::Order& barrier = arena_->barrier[phase_];
  barrier.release();
  if (++at_barrier_ < threads_) {
    park(fibre, Instruction::kSyncBlock, where);
  } else {
    at_barrier_ = 0;
    phase_ ^= 1;
    for (int w = 0; w < threads_ / kWarp; ++w) warps_[w].runnable = ~0u;
    if (options_.order == Options::Order::kRandom) hand_over(fibre);
  }
  barrier.acquire();
  fibre.sequence.renew();
  stir(fibre);
}

void run(const char* name, int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*),
         const void* argument) {
  Launch(name, blocks, threads, shared_bytes, body, argument).run();
}

void sync_block(Where where) { launch->sync_block(__builtin_return_address(0), where); }

int64_t block_count() { return launch->block_count(); }

}  // namespace smartclip::emulator
