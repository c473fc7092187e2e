// wgmma: what a matrix unit reads through its descriptors, and the sums that it makes.
#include <cstring>

#include "cuda_fp16.h"
#include "state.h"

namespace smartclip::emulator {

namespace {

constexpr int kRows = Product::kWarpRows, kDepth = Product::kDepth, kTogether = 8, kChunk = 16;
constexpr int64_t kLine = Product::kLine, kStepBytes = 2 * kDepth;

int64_t field(uint64_t descriptor, int first, int bits) {
  return static_cast<int64_t>(descriptor >> first & ((uint64_t(1) << bits) - 1));
}

// One function for each width of vectors that a processor may have. All give the same bits: products are exact.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SK_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SK_WIDE
#endif

// Sums as the other matrix instructions make them: collectives.cpp.
SK_WIDE void multiply(const float (&a)[kRows][kDepth], const double (&b)[kDepth][Warpgroup::kMostColumns],
                      float (*sums)[Warpgroup::kMostColumns], int columns) {
  for (int row = 0; row < kRows; ++row)
    for (int first = 0; first < kDepth; first += kTogether) {
      float* const sum = sums[row];
      for (int column = 0; column < columns; ++column) {
        double exact = sum[column];
        for (int k = first; k < first + kTogether; ++k) exact += static_cast<double>(a[row][k]) * b[k][column];
        sum[column] = toward_zero(exact);
      }
    }
}

void widen(const uint16_t* bits, int count, bool half, float* out) {
  for (int i = 0; i < count; ++i) {
    __half number;
    number.bits = bits[i];
    const uint32_t wide = uint32_t(bits[i]) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    out[i] = half ? __half2float(number) : x;
  }
}

}  // namespace

// Rows from first_row on, a multiple of 8. PTX ISA, "Matrix descriptor" and "Strides".
Product::Place Product::place(uint64_t descriptor, int first_row, int rows) {
  const int64_t start = field(descriptor, 0, 14) << 4, group = field(descriptor, 32, 14) << 4;
  const int64_t first = start / kLine * kLine + first_row / 8 * group;
  return {start, group, first, first + (rows / 8 - 1) * group + kGroup};
}

bool Product::reads(int warp, int64_t first, int64_t end) const {
  for (const Place& operand : {rows_of(warp), place(columns, 0, 8 * tiles)})
    if (first < operand.end && operand.first < end) return true;
  return false;
}

void Launch::check_descriptor(const Product& product, uint64_t descriptor, const Product::Place& place) {
  const auto refuse = [&](const std::string& what) { fail(product, "a descriptor " + what); };
  const auto bits = [&](int first, int count) { return field(descriptor, first, count); };
  const std::string start = this->place(shared() + place.start);
  if (bits(62, 2) != 1) refuse("with swizzling " + std::to_string(bits(62, 2)) + ", needs 1: 128 bytes");
  if (bits(49, 3) != 0) refuse("with a base offset");
  if (bits(14, 2) || bits(30, 2) || bits(46, 3) || bits(52, 10)) refuse("with bits that mean nothing");
  if (place.group == 0 || place.group % Product::kGroup != 0)
    refuse("whose groups of 8 rows are " + std::to_string(place.group) + " bytes apart, needs a multiple of 1024");
  if (place.start / kLine % 8 != 0) refuse("of " + start + ", needs the first row of 1024 bytes");
  if (place.start % kLine + kStepBytes > kLine) refuse("of " + start + ", needs 32 bytes of one row");
  const int64_t bytes = place.end - place.first;
  if (!holds(shared() + place.first, bytes))
    refuse("of " + std::to_string(bytes) + " bytes at " + this->place(shared() + place.first));
}

// Rows of 16 numbers; 128-byte swizzling as of boxes: by the address.
void Launch::read_operand(const Product& product, const Product::Place& place, int rows, float* out) {
  for (int r = 0; r < rows; ++r) {
    const int64_t line = place.first + r / 8 * place.group + r % 8 * kLine;
    for (int k = 0; k < kStepBytes / kChunk; ++k) {
      const int64_t chunk = (place.start % kLine / kChunk + k) ^ (line / kLine % 8);
      const unsigned char* const from = shared() + line + chunk * kChunk;
      if (!is_fenced(from, kChunk))
        fail(product, "threads wrote to " + this->place(from) + " without a fence_async after it");
      tsan::reads(from, kChunk, product.site);
      constexpr int kNumbers = kChunk / sizeof(uint16_t);
      uint16_t bits[kNumbers];
      std::memcpy(bits, from, sizeof(bits));
      widen(bits, kNumbers, product.half, out + r * kDepth + k * kNumbers);
    }
  }
}

// A warp's part of the next product.
void Launch::execute(Warpgroup& own, int warp) {
  const int index = own.executed[warp]++;
  const Product& product = own.products[index];
  Traces::OfWarp& trace = arena_->traces.products[(&own - warpgroups_) * Product::kWarps + warp];
  trace.sequence.enter();
  trace.issued[index % Traces::kRing].acquire();
  trace.sequence.renew();
  alignas(64) float a[kRows][kDepth], b_rows[Warpgroup::kMostColumns][kDepth];
  alignas(64) double b[kDepth][Warpgroup::kMostColumns];
  const int columns = 8 * product.tiles;
  const Product::Place of_rows = product.rows_of(warp), of_columns = Product::place(product.columns, 0, columns);
  check_descriptor(product, product.rows, of_rows);
  check_descriptor(product, product.columns, of_columns);
  read_operand(product, of_rows, kRows, a[0]);
  read_operand(product, of_columns, columns, b_rows[0]);
  for (int k = 0; k < kDepth; ++k)
    for (int column = 0; column < columns; ++column) b[k][column] = b_rows[column][k];
  auto* const sums = own.sums[product.sum]->row + warp * kRows;
  for (int row = 0; row < kRows && !product.add; ++row) std::memset(sums[row], 0, columns * sizeof(float));
  multiply(a, b, sums, columns);
  trace.done[index % Traces::kRing].release();
  me().sequence.enter();
}

// Where the next ones are ready, some of them, in random order.
void Launch::stir_products() {
  constexpr int kNow = 4;
  for (int k = 0; k < threads_ / Warpgroup::kThreads; ++k)
    for (int warp = 0; warp < Product::kWarps; ++warp)
      while (warpgroups_[k].may_execute(warp) && random(kNow) == 0) execute(warpgroups_[k], warp);
}

uint32_t operand_address(const void* generic, Where where) {
  const uint32_t address = shared_address(generic, where);
  constexpr int kUnit = 16;
  if (address % kUnit != 0)
    launch->fail(Instruction::kSharedAddress, where,
                 "an operand at " + launch->place(generic) + ", needs a multiple of 16");
  return address;
}

}  // namespace smartclip::emulator
