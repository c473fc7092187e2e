// What works beside the threads of a block: copies, boxes, mbarriers, the matrix units of warpgroups.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "emulator.h"
#include "tsan.h"

namespace smartclip::emulator {

constexpr int kWarp = 32, kMostThreads = 1024;

// What a matrix unit makes of an exact sum: float32, cut off. Without a branch, for many at a time.
inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof(bits));
  // One step towards 0; what float32 is too small for becomes its largest number.
  bits -= std::fabs(static_cast<double>(nearest)) > std::fabs(x);
  float below;
  std::memcpy(&below, &bits, sizeof(below));
  return below;
}

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

// An mbarrier. Its 8 bytes are kBits as long as nobody else writes there.
struct Barrier {
  static constexpr uint64_t kBits = 0x72656972726162ff;
  static constexpr int kMostArrivals = (1 << 20) - 1;
  static constexpr int64_t kMostBytes = (1 << 20) - 1;

  int arrivals, pending;
  int64_t bytes = 0;     // expected and not there yet; below 0, there and not expected yet
  int parity = 0;        // of the phase that has not ended
  int by = 0;            // the thread that initialised it
  bool known = false;    // to engines: fenced
  tsan::Order* phase{};  // two in turn: who waits for a phase must not see what was done in the next
};

struct NamedBarrier {
  static constexpr int kCount = 16;

  int arrived = 0, threads = 0, phase = 0;
  uint32_t lanes[kMostThreads / kWarp] = {};  // of each warp, that have arrived
};

// A box under way.
struct Box {
  unsigned char* to;
  TensorMap map;
  int depth, row;
  unsigned char* barrier;
  const void* site;
  Where where;
  int64_t index;                    // of the block's
  std::vector<unsigned char> data;  // once it was read

  size_t bytes() const { return static_cast<size_t>(map.box_rows) * TensorMap::kRowBytes; }
};

// An instruction of a warpgroup: its threads come to the same ones in the same order, each at its own time.
struct Step {
  Instruction instruction;
  const void* site;
  Where where;
  int number;  // of groups that a wait leaves, or of registers that are asked for
  int arrived = 0;
  bool granted = false;
};

// Each of the four warps has its part of it, 16 rows by all columns, which begins and ends for itself.
struct Product {
  static constexpr int kWarps = 4, kWarpRows = 16, kDepth = 16;
  static constexpr int64_t kLine = 128, kGroup = 8 * kLine;

  // Of an operand, as its descriptor says; from the start of shared memory.
  struct Place {
    int64_t start, group, first, end;
  };
  static Place place(uint64_t descriptor, int first_row, int rows);
  Place rows_of(int warp) const { return place(rows, warp * kWarpRows, kWarpRows); }
  bool reads(int warp, int64_t first, int64_t end) const;

  bool half, add;
  int tiles;
  uint64_t rows, columns;
  Where where;
  const void* site;
  int sum;  // which of the threads' registers
  int issued[kWarps] = {};
};

struct Warpgroup {
  static constexpr int kThreads = 128, kMostColumns = 256;
  struct Sums {
    float row[Product::kWarps * Product::kWarpRows][kMostColumns];
  };

  std::deque<Step> steps;
  std::deque<Product> products;
  std::vector<int> groups;                  // the product that each of them ends before
  int executed[Product::kWarps] = {};       // products
  std::vector<std::unique_ptr<Sums>> sums;  // a thread's registers are poison meanwhile
  int registers = 0;                        // of a thread

  void begin(int first_registers);
  bool may_execute(int warp) const {
    const size_t next = executed[warp];
    return next < products.size() && products[next].issued[warp] == kWarp;
  }
};

// Registers of a thread that products sum up in.
struct Registers {
  float* c;
  int tiles = 0;
  int last = -1;            // the product that uses them last
  bool under_way = false;   // until a wait hands them back
  bool given = false;       // to products, by begin_products
  std::vector<float> seen;  // then
};

// A thread's part of its warpgroup's products.
struct Part {
  size_t step = 0;           // the next one
  size_t group = 0;          // that the next product joins
  int issued = 0, done = 0;  // products
  bool begun = false;
  std::vector<Registers> registers;

  Registers& of(float* c);
};

// How ThreadSanitizer sees engines: each is a sequence of accesses of its own. What one does comes after the issue, and
// before the wait; rings, because what is issued later must not come before it. Kept from block to block, by arenas.
struct Traces {
  static constexpr int kRing = 64;
  struct OfWarp {
    tsan::Sequence sequence;
    tsan::Order issued[kRing], done[kRing];
  };
  tsan::Sequence boxes;
  tsan::Order box_issued[kRing];
  std::deque<std::array<tsan::Order, 2>> barriers;
  OfWarp products[kMostThreads / kWarp];

  tsan::Order* barrier(size_t index);
};

}  // namespace smartclip::emulator
