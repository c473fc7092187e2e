// A launch while it runs: its fibres, what they wait for, and the memory of a block.
#pragma once

#include <signal.h>

#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "engines.h"
#include "fibre.h"
#include "tsan.h"

namespace smartclip::emulator {

constexpr size_t kMostShared = 227 * 1024, kSharedAlignment = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every format, -1 as an integer

struct Options {
  enum class Order { kAscending, kReverse, kRandom } order = Order::kAscending;
  enum class Copies { kLatest, kEarliest, kRandom } copies = Copies::kLatest;
  uint64_t seed = 0;

  static Options read();
};

// One lane's part of a collective. It lies on the lane's stack.
struct Operands {
  uint64_t value;
  int mask;
  const unsigned char* row;
  const unsigned char* source[4];
  uint32_t* out;
  float* c;
  const uint32_t* a;
  uint32_t b[2];
  unsigned char data[16];  // a row that is stored
};

std::string in_words(Instruction instruction, Where where);
void perform(Instruction instruction, Operands* const (&lanes)[kWarp]);

struct Fibre : Identity {
  Context context;
  Part part;
  Instruction instruction{};  // that it waits in
  Where where{};
  unsigned char* barrier = nullptr;  // an mbarrier, a named barrier
  int number = 0;
  tsan::Sequence sequence;
  std::unique_ptr<Engine> engine;
};

inline Fibre& me() { return *static_cast<Fibre*>(const_cast<Identity*>(identity)); }

struct Warp {
  uint32_t runnable = 0, arrived = 0, exited = 0;
  Instruction instruction{};
  const void* site = nullptr;
  Operands* operands[kWarp] = {};
};

// What a block needs, kept from launch to launch. Blocks that follow one another must not be ordered by it, or
// ThreadSanitizer would not see their races: where it is, two take turns.
struct Arena {
  Pages stacks, shared;
  size_t open = 0;
  std::unique_ptr<Fibre[]> fibres;  // side by side, for they are gone through at every collective
  int made = 0;
  int64_t blocks = 0;  // that it has been used for
  tsan::Order barrier[2], named[NamedBarrier::kCount][2], warp[kMostThreads / kWarp], end[2];
  Traces traces;

  void reserve(int threads, size_t shared_bytes);
  char* stack_top(int thread) const;
  unsigned char* shared_end() const;
};

class Launch {
 public:
  Launch(const char* name, int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*),
         const void* argument);
  ~Launch();
  void run();

  // In a fibre.
  void meet(Instruction instruction, const void* site, Where where, Operands& operands);
  void sync_block(const void* site, Where where);
  void sync_warp(const void* site, Where where);
  void issue(const void* site, void* shared, const void* global, int bytes, Where where);
  void commit() { ++me().engine->group; }
  void wait(int pending);

  void init_barrier(const void* site, unsigned char* barrier, int arrivals, Where where);
  void arrive(const void* site, unsigned char* barrier, int bytes, Where where);
  void wait_for(const void* site, unsigned char* barrier, int parity, Where where);
  void fence_async();
  void sync_threads(int barrier, int threads, Where where);
  void copy_box(Box box);
  void begin_products(const void* site, Where where);
  void multiply_add_async(const Product& product, float* c);
  void commit_products(const void* site, Where where);
  void wait_for_products(const void* site, float* c, int pending, Where where);
  void set_registers(const void* site, int registers, bool more, Where where);

  int64_t block_count() const { return blocks_; }
  unsigned char* shared() const;
  size_t shared_bytes() const { return shared_bytes_; }
  bool holds(const void* address, size_t bytes) const;
  std::string place(const void* address) const;

  // Neither returns: the fibre is left where it stands, and run() throws.
  [[noreturn]] void fail(Instruction instruction, Where where, const std::string& what);
  [[noreturn]] void fail(const Product& product, const std::string& what);
  [[noreturn]] void fault(int signal, const void* address, const sigset_t& before);

 private:
  static void enter();
  void leave();
  void finish(const tsan::Sequence& sequence);
  void finish(Fibre& fibre);
  void run_block(int64_t block);
  void abandon();
  void go(Context& from, Fibre& to);
  void hand_over(Fibre& fibre);
  void park(Fibre& fibre, Instruction instruction, Where where);
  Fibre* fibre(int warp, int lane) const { return &arena_->fibres[warp * kWarp + lane]; }
  Fibre* next(const Fibre* from);
  int choose(uint32_t set, int from);
  uint64_t random(uint64_t below) { return std::uniform_int_distribution<uint64_t>(0, below - 1)(random_); }

  void stir(Fibre& fibre) {
    if (options_.copies == Options::Copies::kRandom) stir_some(fibre);
  }
  void stir_some(Fibre& fibre);
  // Until something changes that a fibre may wait for.
  void sleep(Fibre& fibre, Instruction instruction, Where where);
  void wake();
  void begin_engines();
  void finish_engines();
  std::string unfinished_text() const;

  Barrier& barrier(unsigned char* address, Instruction instruction, Where where);
  void end_phase(Barrier& barrier);
  std::string missing_text(unsigned char* address, int parity) const;

  // The copy engine's turn, where no fibre has one. Whether there was anything to do.
  bool advance();
  void read_box(Box& box);
  void land_box(size_t index);
  // Whether engines see what threads do.
  bool is_fenced(const unsigned char* first, size_t bytes) const;

  Warpgroup& warpgroup(Instruction instruction, Where where);
  Step& together(Warpgroup& own, Instruction instruction, const void* site, Where where, int number = 0);
  void stir_products();
  void execute(Warpgroup& own, int warp);
  void check_descriptor(const Product& product, uint64_t descriptor, const Product::Place& place);
  void read_operand(const Product& product, const Product::Place& place, int rows, float* out);
  void deliver(const Warpgroup& own, Fibre& fibre, Registers& registers, Where where);

  void read(Fibre& fibre, Copy& copy);
  void land(Fibre& fibre, Copy& copy);

  [[noreturn]] void stop(std::string error);
  std::string block_text() const;
  std::string thread_text(const Fibre& fibre) const;
  std::string waiting_text() const;
  std::string fault_text() const;
  std::string edge_text() const;

  const char* const name_;
  const int64_t blocks_;
  const int threads_;
  const size_t shared_bytes_;
  void (*const body_)(const void*);
  const void* const argument_;
  const Options options_ = Options::read();
  std::mt19937_64 random_;

  int64_t block_ = 0;
  Arena* arena_ = nullptr;
  Warp warps_[kMostThreads / kWarp];
  int at_barrier_ = 0, exited_ = 0, phase_ = 0;
  const void* barrier_site_ = nullptr;

  std::map<unsigned char*, Barrier> barriers_;
  NamedBarrier named_[NamedBarrier::kCount];
  std::vector<Fibre*> sleepers_;
  std::vector<Box> boxes_;  // under way
  int64_t boxes_issued_ = 0;
  Warpgroup warpgroups_[kMostThreads / Warpgroup::kThreads];
  std::vector<unsigned char> async_view_;  // of shared memory: what engines see

  Context main_;
  tsan::Sequence main_sequence_;
  tsan::Order begin_, end_;
  std::string error_;
  int fault_signal_ = 0;
  sigset_t fault_mask_{};
  const void* fault_address_ = nullptr;
  const Fibre* faulty_ = nullptr;
};

extern SK_THREAD_LOCAL Launch* launch;

void install_fault_handler();

}  // namespace smartclip::emulator
