// wgmma: a warpgroup's products, made by an engine between their issue and their wait, in their order.
#include <cmath>
#include <cstring>
#include <limits>

#include "cuda_fp16.h"
#include "state.h"

namespace smartclip::emulator {

namespace {

constexpr int kDepth = 16, kTogether = 8, kStepBytes = 32;

// The place of a thread's number `k` of tile m in the warpgroup's 64 rows (PTX ISA, "Register fragments … wgmma, D").
struct At {
  int row, column;
};
At at(const Identity& thread, int m, int k) {
  return {16 * (thread.warp % 4) + thread.lane / 4 + 8 * (k / 2), 8 * m + 2 * (thread.lane % 4) + k % 2};
}

float widened(uint16_t bits, bool half) {
  if (half) {
    __half number;
    number.bits = bits;
    return __half2float(number);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

}  // namespace

void Launch::multiply_add_async(const void* site, bool half, float* c, int tiles, uint64_t rows, uint64_t columns,
                                bool add, Where where) {
  Fibre& fibre = me();
  Warpgroup& own = warpgroup();
  Part& part = fibre.part;
  const auto refuse = [&](const std::string& what) { fail(Instruction::kProduct, where, what); };
  if (!part.begun) refuse("no begin_products since threads had the sums");
  size_t sum = 0;
  while (sum < part.sums.size() && part.sums[sum] != c) ++sum;
  if (sum == part.sums.size()) part.sums.push_back(c), part.last.push_back(-1);
  while (own.sums.size() <= sum) own.sums.push_back(std::make_unique<Warpgroup::Sums>());
  if (static_cast<size_t>(part.issued) == own.products.size())
    own.products.push_back({half, add, false, tiles, static_cast<int>(sum), 0, rows, columns, site});
  Product& product = own.products[part.issued];
  if (product.half != half || product.add != add || product.tiles != tiles || product.sum != static_cast<int>(sum) ||
      product.rows != rows || product.columns != columns || product.site != site)
    refuse("the warpgroup is divided: another thread's product is another");
  const bool pending = part.last[sum] >= part.delivered;
  for (int m = 0; m < tiles; ++m)
    for (int k = 0; k < 4; ++k) {
      const At place = at(fibre, m, k);
      if (add && !pending) own.sums[sum]->row[place.row][place.column] = c[4 * m + k];
      c[4 * m + k] = std::numeric_limits<float>::quiet_NaN();
    }
  part.last[sum] = part.issued++;
  own.sequence.create("products of emulated warpgroup", fibre.thread / Warpgroup::kThreads);
  own.issued.release();
  fibre.sequence.renew();
  if (++product.issued == Warpgroup::kThreads) {
    wake();
    if (options_.copies == Options::Copies::kEarliest) execute(own);
  }
  stir(fibre);
}

// Rows of 16 numbers. PTX ISA, "Matrix descriptor", "Strides", and 128-byte swizzling as of boxes: by the address.
void Launch::read_operand(const Product& product, uint64_t descriptor, int rows, float* out) {
  const auto field = [&](int first, int bits) { return int64_t(descriptor >> first & ((uint64_t(1) << bits) - 1)); };
  const int64_t start = field(0, 14) << 4, group = field(32, 14) << 4;
  const auto refuse = [&](const std::string& what) { fail(Instruction::kProduct, {"", 0}, "a descriptor " + what); };
  if (field(62, 2) != 1) refuse("without the swizzling of 128 bytes: " + std::to_string(field(62, 2)));
  if (field(49, 3) != 0) refuse("with a base offset");
  if (group != 1024) refuse("whose groups of 8 rows are " + std::to_string(group) + " bytes apart, needs 1024");
  for (int r = 0; r < rows; ++r)
    for (int byte = 0; byte < kStepBytes; byte += 16) {
      const int64_t address = start + r / 8 * group + r % 8 * 128 + byte;
      const int64_t swizzled = address ^ (address >> 7 & 7) << 4;
      const unsigned char* const from = shared() + swizzled;
      if (!holds(from, 16)) refuse("of " + place(from));
      if (std::memcmp(from, async_view_.data() + swizzled, 16) != 0)
        refuse("of " + place(from) + ", which threads wrote without a fence_async after it");
      tsan::reads(from, 16, product.site);
      uint16_t bits[8];
      std::memcpy(bits, from, sizeof(bits));
      for (int i = 0; i < 8; ++i) out[r * kDepth + byte / 2 + i] = widened(bits[i], product.half);
    }
}

// The next of a warpgroup's products. Sums are made as the other matrix instructions make them: collectives.cpp.
void Launch::execute(Warpgroup& own) {
  Product& product = own.products[own.executed++];
  Fibre& fibre = me();
  own.sequence.enter();
  own.issued.acquire();
  own.sequence.renew();
  float a[Warpgroup::kRows * kDepth], b_rows[Warpgroup::kMostColumns * kDepth];
  double b[kDepth][Warpgroup::kMostColumns];
  const int columns = 8 * product.tiles;
  read_operand(product, product.rows, Warpgroup::kRows, a);
  read_operand(product, product.columns, columns, b_rows);
  for (int column = 0; column < columns; ++column)
    for (int k = 0; k < kDepth; ++k) b[k][column] = b_rows[column * kDepth + k];
  Warpgroup::Sums& sums = *own.sums[product.sum];
  for (int row = 0; row < Warpgroup::kRows; ++row) {
    float* const sum = sums.row[row];
    if (!product.add)
      for (int column = 0; column < columns; ++column) sum[column] = 0;
    for (int first = 0; first < kDepth; first += kTogether) {
      double exact[Warpgroup::kMostColumns];
      for (int column = 0; column < columns; ++column) exact[column] = sum[column];
      for (int k = first; k < first + kTogether; ++k) {
        const double number = a[row * kDepth + k];
        for (int column = 0; column < columns; ++column) exact[column] += number * b[k][column];
      }
      for (int column = 0; column < columns; ++column) sum[column] = toward_zero(exact[column]);
    }
  }
  product.done = true;
  own.done.release();
  fibre.sequence.enter();
}

void Launch::deliver(Fibre& fibre, int sum) {
  const Warpgroup& own = warpgroups_[fibre.thread / Warpgroup::kThreads];
  float* const c = fibre.part.sums[sum];
  for (int m = 0; m < own.products[fibre.part.last[sum]].tiles; ++m)
    for (int k = 0; k < 4; ++k) {
      const At place = at(fibre, m, k);
      c[4 * m + k] = own.sums[sum]->row[place.row][place.column];
    }
}

void Launch::wait_for_products(int pending, Where where) {
  Fibre& fibre = me();
  Warpgroup& own = warpgroup();
  Part& part = fibre.part;
  stir(fibre);
  const int groups = static_cast<int>(part.groups.size());
  const int end = groups > pending ? part.groups[groups - 1 - pending] : part.delivered;
  while (own.executed < end) {
    if (own.products[own.executed].issued < Warpgroup::kThreads)
      sleep(fibre, Instruction::kWaitForProducts, where);
    else
      execute(own);
  }
  if (end > part.delivered) {
    for (size_t sum = 0; sum < part.sums.size(); ++sum)
      if (part.last[sum] >= part.delivered && part.last[sum] < end) deliver(fibre, static_cast<int>(sum));
    part.delivered = end;
    own.done.acquire();
    fibre.sequence.renew();
  }
  if (part.delivered == part.issued) part.begun = false;
  stir(fibre);
}

void begin_products() { me().part.begun = true; }
void multiply_add_async(bool half, float* c, int tiles, uint64_t rows, uint64_t columns, bool add, Where where) {
  launch->multiply_add_async(__builtin_return_address(0), half, c, tiles, rows, columns, add, where);
}
void commit_products() { me().part.groups.push_back(me().part.issued); }
void wait_for_products(int pending, Where where) { launch->wait_for_products(pending, where); }

}  // namespace smartclip::emulator
