// A launch while it runs: its fibres, what they wait for, and the memory of a block.
#pragma once

#include <signal.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "fibre.h"
#include "tsan.h"

namespace smartclip::emulator {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kMostShared = 227 * 1024, kSharedAlignment = 128;
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
};

const char* name_of(Instruction instruction);
void perform(Instruction instruction, Operands* const (&lanes)[kWarp]);

// cp.async: a thread's copies, in order of issue.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  const void* site;
  int bytes;
  int64_t group;
  bool was_read, landed;
  unsigned char data[16];
};

struct Engine {
  static constexpr int kMost = 256, kGroups = 16;
  Copy copies[kMost];  // a ring
  int64_t first = 0, end = 0;
  int64_t group = 0;        // that the next copy joins
  tsan::Sequence sequence;  // made with the first copy
  tsan::Order issued[kGroups], landed;

  Copy& at(int64_t index) { return copies[index % kMost]; }
};

struct Fibre : Identity {
  Context context;
  Instruction instruction{};  // that it waits in
  Where where{};
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
  tsan::Order barrier[2], end[2];

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
  void issue(const void* site, void* shared, const void* global, int bytes, Where where);
  void commit() { ++me().engine->group; }
  void wait(int pending);

  unsigned char* shared() const;
  size_t shared_bytes() const { return shared_bytes_; }
  bool holds(const void* address, size_t bytes) const;
  std::string place(const void* address) const;

  // Neither returns: the fibre is left where it stands, and run() throws.
  [[noreturn]] void fail(Instruction instruction, Where where, const std::string& what);
  [[noreturn]] void fault(int signal, const void* address, const sigset_t& before);

 private:
  static void enter();
  void leave();
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
