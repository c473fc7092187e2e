// What the lanes of a warp do together, once all of them are there.
#include <cmath>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "state.h"

namespace smartclip::emulator {

namespace {

using Lanes = Operands* const (&)[kWarp];

float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

template <class Word, class Widen>
void widen_all(const uint32_t* words, float* numbers, int count, Widen widen) {
  Word narrow[256];
  std::memcpy(narrow, words, count * sizeof(Word));
  for (int i = 0; i < count; ++i) numbers[i] = widen(narrow[i]);
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type" and "… mma.m16n8k8": with g = lane / 4 and
// t = lane % 4, register r of a is row g + 8 (r % 2), of b it is column g. One register is 4 bytes of depth: numbers
// from t + 4 (r / 2) registers on in a, from t + 4 r on in b. Register r of c is row g + 8 (r / 2), column 2 t + r % 2.
// Products are exact. How they are summed the manual leaves open; measurements of the units found that they add half of
// the depth at a time to the sum, and cut off what float32 cannot hold (Fasi et al., "Numerical behavior of NVIDIA
// tensor cores", PeerJ CS 2021; Ootomo and Yokota, IJHPCA 2022). So a long sum of one sign comes out too small.
template <class Word, class Widen>
void multiply(Lanes lanes, Widen widen) {
  constexpr int kPerRegister = sizeof(uint32_t) / sizeof(Word), kDepth = 8 * kPerRegister, kTogether = kDepth / 2;
  uint32_t a_words[16][8], b_words[8][8];  // by row or column, and depth
  float a[16][kDepth], b_columns[8][kDepth], c[16][8];
  double b[kDepth][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Operands& x = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) a_words[g + 8 * (r % 2)][t + 4 * (r / 2)] = x.a[r];
    for (int r = 0; r < 2; ++r) b_words[g][t + 4 * r] = x.b[r];
    for (int r = 0; r < 4; ++r) c[g + 8 * (r / 2)][2 * t + r % 2] = x.c[r];
  }
  widen_all<Word>(a_words[0], a[0], 16 * kDepth, widen);
  widen_all<Word>(b_words[0], b_columns[0], 8 * kDepth, widen);
  for (int k = 0; k < kDepth; ++k)
    for (int column = 0; column < 8; ++column) b[k][column] = b_columns[column][k];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; k += kTogether) {
      double sum[8];
      for (int column = 0; column < 8; ++column) sum[column] = c[row][column];
      for (int step = k; step < k + kTogether; ++step) {
        const double number = a[row][step];
        for (int column = 0; column < 8; ++column) sum[column] += number * b[step][column];
      }
      for (int column = 0; column < 8; ++column) c[row][column] = toward_zero(sum[column]);
    }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int r = 0; r < 4; ++r) lanes[lane]->c[r] = c[lane / 4 + 8 * (r / 2)][2 * (lane % 4) + r % 2];
}

// PTX ISA, "ldmatrix": row i of matrix m begins where lane 8 m + i says; lane l gets 4 bytes of row l / 4, the
// (l % 4)-th.
void load(Lanes lanes) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int m = 0; m < 4; ++m) {
      lanes[lane]->source[m] = lanes[8 * m + lane / 4]->row + lane % 4 * 4;
      std::memcpy(&lanes[lane]->out[m], lanes[lane]->source[m], 4);
    }
}

// PTX ISA, "stmatrix": the same, the other way round.
void gather_rows(Lanes lanes) {
  for (int lane = 0; lane < kWarp; ++lane)
    for (int m = 0; m < 4; ++m) std::memcpy(lanes[8 * m + lane / 4]->data + lane % 4 * 4, &lanes[lane]->a[m], 4);
}

}  // namespace

void perform(Instruction instruction, Operands* const (&lanes)[kWarp]) {
  switch (instruction) {
    case Instruction::kShuffle: {
      uint64_t values[kWarp];
      for (int l = 0; l < kWarp; ++l) values[l] = lanes[l]->value;
      for (int l = 0; l < kWarp; ++l) lanes[l]->value = values[l ^ lanes[l]->mask];
      return;
    }
    case Instruction::kAny: {
      uint64_t any = 0;
      for (const Operands* lane : lanes) any |= lane->value;
      for (Operands* lane : lanes) lane->value = any;
      return;
    }
    case Instruction::kLoadMatrices:
      return load(lanes);
    case Instruction::kStoreMatrices:
      return gather_rows(lanes);
    case Instruction::kMultiplyBfloat16:
      return multiply<uint16_t>(lanes, [](uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); });
    case Instruction::kMultiplyHalf:
      return multiply<uint16_t>(lanes, [](uint16_t bits) {
        __half half;
        half.bits = bits;
        return __half2float(half);
      });
    case Instruction::kMultiplyTf32:
      return multiply<uint32_t>(lanes, [](uint32_t bits) { return bits_to_float(bits); });
    default:
      return;
  }
}

uint64_t shuffle_xor(uint64_t value, int mask, Where where) {
  if (mask < 0 || mask >= kWarp) launch->fail(Instruction::kShuffle, where, "mask " + std::to_string(mask));
  Operands operands;
  operands.value = value;
  operands.mask = mask;
  launch->meet(Instruction::kShuffle, __builtin_return_address(0), where, operands);
  return operands.value;
}

bool any_in_warp(bool value, Where where) {
  Operands operands;
  operands.value = value;
  launch->meet(Instruction::kAny, __builtin_return_address(0), where, operands);
  return operands.value != 0;
}

void load_matrices(uint32_t* out, const void* row, Where where) {
  constexpr int kBytes = 16;
  if (reinterpret_cast<uintptr_t>(row) % kBytes != 0 || !launch->holds(row, kBytes))
    launch->fail(Instruction::kLoadMatrices, where, "a row of 16 bytes at " + launch->place(row));
  const void* const site = __builtin_return_address(0);
  Operands operands;
  operands.row = static_cast<const unsigned char*>(row);
  operands.out = out;
  launch->meet(Instruction::kLoadMatrices, site, where, operands);
  for (const unsigned char* source : operands.source) tsan::reads(source, 4, site);
}

void store_matrices(const uint32_t* in, void* row, Where where) {
  constexpr int kBytes = 16;
  if (reinterpret_cast<uintptr_t>(row) % kBytes != 0 || !launch->holds(row, kBytes))
    launch->fail(Instruction::kStoreMatrices, where, "a row of 16 bytes at " + launch->place(row));
  const void* const site = __builtin_return_address(0);
  Operands operands;
  operands.a = in;
  launch->meet(Instruction::kStoreMatrices, site, where, operands);
  tsan::writes(row, kBytes, site);
  std::memcpy(row, operands.data, kBytes);
}

void sync_warp(Where where) { launch->sync_warp(__builtin_return_address(0), where); }

void Launch::sync_warp(const void* site, Where where) {
  Fibre& fibre = me();
  tsan::Order& order = arena_->warp[fibre.warp];
  order.release();
  Operands operands;
  meet(Instruction::kSyncWarp, site, where, operands);
  order.acquire();
  fibre.sequence.renew();
}

void multiply_add(Instruction instruction, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Where where) {
  // What the unit does with digits that tf32 has not got is nowhere said. NaN has them all.
  if (instruction == Instruction::kMultiplyTf32)
    for (const uint32_t bits : {a[0], a[1], a[2], a[3], b0, b1})
      if ((bits & 0x1fffu) && (bits & 0x7fffffffu) <= 0x7f800000u)
        launch->fail(instruction, where, "an operand was not rounded to tf32");
  Operands operands;
  operands.c = c;
  operands.a = a;
  operands.b[0] = b0, operands.b[1] = b1;
  launch->meet(instruction, __builtin_return_address(0), where, operands);
}

}  // namespace smartclip::emulator
