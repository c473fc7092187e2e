// What a warpgroup is told to do: products and when they are there (PTX ISA, "wgmma"), registers ("setmaxnreg").
#include <cstring>

#include "state.h"

namespace smartclip::emulator {

namespace {

// The place of a thread's number `k` of tile m in the warpgroup's 64 rows (PTX ISA, "Register fragments … wgmma, D").
struct At {
  int row, column;
};
At at(const Identity& thread, int m, int k) {
  return {16 * (thread.warp % 4) + thread.lane / 4 + 8 * (k / 2), 8 * m + 2 * (thread.lane % 4) + k % 2};
}

bool same(const Product& x, const Product& y) {
  return x.half == y.half && x.add == y.add && x.tiles == y.tiles && x.rows == y.rows && x.columns == y.columns &&
         x.sum == y.sum;
}

bool is_poison(const float* numbers, int count) {
  const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(numbers);
  for (size_t i = 0; i < count * sizeof(float); ++i)
    if (bytes[i] != kPoison) return false;
  return true;
}

}  // namespace

Warpgroup& Launch::warpgroup(Instruction instruction, Where where) {
  const int index = me().thread / Warpgroup::kThreads;
  if (index >= threads_ / Warpgroup::kThreads) fail(instruction, where, "the block's last warps are no warpgroup");
  return warpgroups_[index];
}

// The thread's next step, which must be the one of all others.
Step& Launch::together(Warpgroup& own, Instruction instruction, const void* site, Where where, int number) {
  Part& part = me().part;
  if (part.step == own.steps.size()) own.steps.push_back({instruction, site, where, number});
  Step& step = own.steps[part.step++];
  if (step.instruction != instruction || step.site != site || step.number != number)
    fail(instruction, where, "the warpgroup is divided: others came to " + in_words(step.instruction, step.where));
  ++step.arrived;
  return step;
}

// Sums are the products' now. Those that products sum up already were before.
void Launch::begin_products(const void* site, Where where) {
  Part& part = me().part;
  together(warpgroup(Instruction::kBeginProducts, where), Instruction::kBeginProducts, site, where);
  part.begun = true;
  for (Registers& own : part.registers) {
    if (own.under_way) continue;
    own.given = true;
    own.seen.assign(own.c, own.c + 4 * own.tiles);
  }
}

void Launch::multiply_add_async(const Product& issued, float* c) {
  Fibre& fibre = me();
  Part& part = fibre.part;
  const auto refuse = [&](const std::string& what) { fail(Instruction::kProduct, issued.where, what); };
  Warpgroup& own = warpgroup(Instruction::kProduct, issued.where);
  together(own, Instruction::kProduct, issued.site, issued.where);
  Registers& registers = part.of(c);
  const int count = 4 * issued.tiles;
  const bool chained = registers.under_way;
  if (chained) {
    if (registers.tiles != issued.tiles) refuse("products of another shape are under way to these sums");
  } else {
    for (const Registers& other : part.registers)
      if (other.under_way && c < other.c + 4 * other.tiles && other.c < c + count)
        refuse("products are under way to some of these sums");
    if (!(registers.last < 0 ? part.begun : registers.given)) refuse("no begin_products since threads had the sums");
    const bool known = registers.given && registers.tiles == issued.tiles;
    if (issued.add && known && std::memcmp(registers.seen.data(), c, count * sizeof(float)) != 0)
      refuse("a thread changed the sums after begin_products");
    registers.tiles = issued.tiles;
  }

  const size_t sum = &registers - part.registers.data();
  while (own.sums.size() <= sum) own.sums.push_back(std::make_unique<Warpgroup::Sums>());
  if (static_cast<size_t>(part.issued) == own.products.size()) {
    own.products.push_back(issued);
    own.products.back().sum = static_cast<int>(sum);
  }
  Product& product = own.products[part.issued];
  Product this_one = issued;
  this_one.sum = static_cast<int>(sum);
  if (!same(product, this_one)) refuse("the warpgroup is divided: another thread's product is another");
  const int warp = fibre.warp % Product::kWarps;
  for (const Box& box : boxes_)
    if (product.reads(warp, box.to - shared(), box.to - shared() + static_cast<int64_t>(box.bytes())))
      refuse("a box is under way to its operands: " + in_words(Instruction::kCopyBox, box.where));
  if (!chained) {
    for (int i = 0; i < count && issued.add; ++i) {
      const At place = at(fibre, i / 4, i % 4);
      own.sums[sum]->row[place.row][place.column] = c[i];
    }
    std::memset(c, kPoison, count * sizeof(float));
  }
  Traces::OfWarp& trace = arena_->traces.products[fibre.warp];
  trace.sequence.create("products of emulated warp", fibre.warp);
  trace.issued[part.issued % Traces::kRing].release();
  fibre.sequence.renew();
  registers.last = part.issued++;
  registers.under_way = true;
  registers.given = false;
  if (++product.issued[warp] == kWarp) {
    wake();
    if (options_.copies == Options::Copies::kEarliest) execute(own, warp);
  }
  stir(fibre);
}

void Launch::commit_products(const void* site, Where where) {
  Part& part = me().part;
  Warpgroup& own = warpgroup(Instruction::kCommitProducts, where);
  together(own, Instruction::kCommitProducts, site, where);
  if (part.group++ == own.groups.size()) own.groups.push_back(part.issued);
}

void Launch::wait_for_products(const void* site, float* c, int pending, Where where) {
  Fibre& fibre = me();
  Part& part = fibre.part;
  Warpgroup& own = warpgroup(Instruction::kWaitForProducts, where);
  together(own, Instruction::kWaitForProducts, site, where, pending);
  stir(fibre);
  const size_t left = pending;
  const int end = part.group > left ? own.groups[part.group - 1 - left] : 0;
  const int warp = fibre.warp % Product::kWarps;
  while (own.executed[warp] < end) {
    if (own.may_execute(warp))
      execute(own, warp);
    else
      sleep(fibre, Instruction::kWaitForProducts, where);
  }
  if (end > part.done) {
    part.done = end;
    part.begun = false;
    arena_->traces.products[fibre.warp].done[(end - 1) % Traces::kRing].acquire();
    fibre.sequence.renew();
  }
  for (Registers& registers : part.registers)
    if (registers.c == c && registers.under_way && registers.last < part.done) deliver(own, fibre, registers, where);
  stir(fibre);
}

void Launch::deliver(const Warpgroup& own, Fibre& fibre, Registers& registers, Where where) {
  const int count = 4 * registers.tiles;
  if (!is_poison(registers.c, count))
    fail(Instruction::kWaitForProducts, where, "a thread wrote to sums while products were under way");
  registers.under_way = false;
  const Warpgroup::Sums& sums = *own.sums[own.products[registers.last].sum];
  for (int i = 0; i < count; ++i) {
    const At place = at(fibre, i / 4, i % 4);
    registers.c[i] = sums.row[place.row][place.column];
  }
}

// Who asks for more waits until others have given enough.
void Launch::set_registers(const void* site, int registers, bool more, Where where) {
  constexpr int kPool = 65536 / Warpgroup::kThreads, kLeast = 24, kMost = 256, kUnit = 8;
  const Instruction instruction = more ? Instruction::kTakeRegisters : Instruction::kGiveRegisters;
  const auto refuse = [&](const std::string& what) { fail(instruction, where, what); };
  Warpgroup& own = warpgroup(instruction, where);
  if (registers < kLeast || registers > kMost || registers % kUnit != 0)
    refuse(std::to_string(registers) + " registers, needs a multiple of 8 from 24 to 256");
  if (more ? registers < own.registers : registers > own.registers)
    refuse(std::to_string(registers) + " registers, the warpgroup has " + std::to_string(own.registers));
  Step& step = together(own, instruction, site, where, registers);
  const auto there_are_enough = [&] {
    int others = 0;
    for (int k = 0; k < threads_ / Warpgroup::kThreads; ++k)
      if (&warpgroups_[k] != &own) others += warpgroups_[k].registers;
    return others + registers <= kPool;
  };
  if (step.arrived == Warpgroup::kThreads) wake();
  while (!step.granted) {
    if (step.arrived < Warpgroup::kThreads || !there_are_enough()) {
      sleep(me(), instruction, where);
      continue;
    }
    own.registers = registers;
    step.granted = true;
    wake();
  }
}

void begin_products(Where where) { launch->begin_products(__builtin_return_address(0), where); }
void multiply_add_async(bool half, float* c, int tiles, uint64_t rows, uint64_t columns, bool add, Where where) {
  launch->multiply_add_async({half, add, tiles, rows, columns, where, __builtin_return_address(0), 0}, c);
}
void commit_products(Where where) { launch->commit_products(__builtin_return_address(0), where); }
void wait_for_products(float* c, int pending, Where where) {
  launch->wait_for_products(__builtin_return_address(0), c, pending, where);
}
void set_registers(int registers, bool more, Where where) {
  launch->set_registers(__builtin_return_address(0), registers, more, where);
}

}  // namespace smartclip::emulator
