// Micro-kernels of products of a warpgroup, and of the ring of stages that brings their operands; and their faults.
#pragma once

#include <ptx/barrier.h>  // not "ptx/…", which would be the emulator's on a device too
#include <ptx/box.h>
#include <ptx/thread.h>
#include <ptx/warpgroup.h>

#include "micro_barriers.cuh"

namespace smartclip::micro {

// A thread's sums as they lie in its registers: (thread, register).
template <int kTiles>
SK_DEVICE void store_sums(const float (&c)[kTiles][4], float* out) {
  for (int m = 0; m < kTiles; ++m)
    for (int k = 0; k < 4; ++k) out[(ptx::thread_index() % 128 * kTiles + m) * 4 + k] = c[m][k];
}

// By 128 threads.
template <int kBytes>
SK_DEVICE void put(unsigned char (&to)[kBytes], const unsigned char* from) {
  for (int i = ptx::thread_index(); i < kBytes; i += 128) to[i] = from[i];
}

template <int kColumns>
struct Tiles {
  alignas(1024) unsigned char rows[64 * kRowBytes];
  alignas(1024) unsigned char columns[kColumns * kRowBytes];
};

// start + rows columns^T, of operands as they lie in shared memory, step by step of 64 numbers; sums as registers.
// number: steps, whether there is a start, fault, bits of the rows' descriptors that are wrong.
template <class Element, int kColumns>
SK_KERNEL(128, 1)
product(SK_PARAMETER Parameters p) {
  auto& shared = ptx::shared_storage<Tiles<kColumns>>();
  const int thread = ptx::thread_index(), steps = static_cast<int>(p.number[0]), fault = fault_of(p.number[2]);
  const uint64_t wrong = fault_of(p.number[3] != 0) ? static_cast<uint64_t>(p.number[3]) : 0;
  const bool start = p.number[1] != 0;
  float c[kColumns / 8][4], other[kColumns / 8][4];
  for (int m = 0; m < kColumns / 8; ++m)
    for (int k = 0; k < 4; ++k) c[m][k] = start ? p.input<float>(2)[(thread * kColumns / 8 + m) * 4 + k] : 0.0f;
  for (int step = 0; step < steps; ++step) {
    put(shared.rows, p.input<unsigned char>(0) + step * sizeof(shared.rows));
    put(shared.columns, p.input<unsigned char>(1) + step * sizeof(shared.columns));
    if (fault != kNoFence) ptx::fence_async();
    if (fault != kNoBarrier) ptx::sync_block();
    if (fault != kNoBegin) ptx::begin_products();
    if (fault == kTouchedBefore && step == 1 && thread == 77) c[0][1] += 1.0f;
    const int odd = fault == kWrongPlace ? 8 : fault == kDivided && thread == 77 ? 32 : 0;
    for (int byte = 0; byte < kRowBytes; byte += 32)
      ptx::multiply_add_async<Element>(c, ptx::matrix_descriptor(shared.rows + (byte ^ odd)) ^ wrong,
                                       ptx::matrix_descriptor(shared.columns + byte), start || step > 0 || byte > 0);
    if (fault == kTouchedAfter && thread == 77) c[0][1] = 1.0f;
    if (fault != kNoCommit) ptx::commit_products();
    if (fault == kNoWait) store_sums(c, p.output<float>());
    if (fault == kNeverWait) return;
    ptx::wait_for_products<0>(fault == kOtherSums ? other : c);
    if (fault == kNoWait) return;
    if (fault != kNoBarrier) ptx::sync_block();
  }
  store_sums(c, p.output<float>());
}

// Two groups: rows times the first 64 columns, and times the next. The first sums are stored before the second are
// there, and then added to once more. number: fault.
SK_KERNEL(128, 1)
groups(SK_PARAMETER Parameters p) {
  constexpr int kColumns = 64, kSums = 64 * kColumns;
  auto& shared = ptx::shared_storage<Tiles<2 * kColumns>>();
  const int fault = fault_of(p.number[0]);
  put(shared.rows, p.input<unsigned char>(0));
  put(shared.columns, p.input<unsigned char>(1));
  ptx::fence_async();
  ptx::sync_block();
  float first[kColumns / 8][4], second[kColumns / 8][4];
  const auto multiply = [&](float (&c)[kColumns / 8][4], const unsigned char* columns, bool add) {
    for (int byte = 0; byte < kRowBytes; byte += 32)
      ptx::multiply_add_async<__nv_bfloat16>(c, ptx::matrix_descriptor(shared.rows + byte),
                                             ptx::matrix_descriptor(columns + byte), add || byte > 0);
    ptx::commit_products();
  };
  ptx::begin_products();
  multiply(first, shared.columns, false);
  if (fault == kOverlap) multiply(reinterpret_cast<float (&)[kColumns / 8][4]>(first[4]), shared.columns, false);
  multiply(second, shared.columns + kColumns * kRowBytes, false);
  ptx::wait_for_products<1>(first);
  store_sums(first, p.output<float>());
  if (fault == kNoWait) store_sums(second, p.output<float>() + kSums);
  if (fault != kNoBegin) ptx::begin_products();
  multiply(first, shared.columns, true);
  ptx::wait_for_products<1>(second);
  if (fault != kNoWait) store_sums(second, p.output<float>() + kSums);
  ptx::wait_for_products<0>(first);
  store_sums(first, p.output<float>() + 2 * kSums);
}

// in[0]: 32 x 4 words, in[1]: where each lane's row goes. What lies in 32 rows of 16 bytes then.
SK_KERNEL(32, 1)
store_matrices(SK_PARAMETER Parameters p) {
  struct Rows {
    alignas(16) uint32_t row[32][4];
  };
  Rows& shared = ptx::shared_storage<Rows>();
  const int lane = ptx::lane_index();
  uint32_t word[4];
  for (int k = 0; k < 4; ++k) word[k] = p.input<uint32_t>(0)[lane * 4 + k];
  ptx::store_matrices(word, reinterpret_cast<unsigned char*>(&shared.row[p.input<int>(1)[lane]]) + p.number[0]);
  if (!p.number[1]) ptx::sync_warp();
  for (int k = 0; k < 4; ++k) p.output<uint32_t>()[lane * 4 + k] = shared.row[lane ^ 8][k];
}

// A ring of stages, as the library's: one thread brings boxes, a warpgroup multiplies. number: steps of depth, fault.
struct Ring {
  static constexpr int kStages = 2, kBytes = 2 * 64 * kRowBytes;
  struct {
    alignas(1024) unsigned char rows[64 * kRowBytes], columns[64 * kRowBytes];
  } stages[kStages];
  ptx::Barrier full[kStages], empty[kStages];
};
SK_KERNEL(256, 1)
ring(SK_PARAMETER Mapped p) {
  Ring& shared = ptx::shared_storage<Ring>();
  const int thread = ptx::thread_index(), steps = static_cast<int>(p.number[0]), fault = fault_of(p.number[1]);
  if (thread == 0) {
    for (int k = 0; k < Ring::kStages; ++k) {
      ptx::init_barrier(shared.full[k], 1);
      ptx::init_barrier(shared.empty[k], 4);
    }
    if (fault != kNoFence) ptx::fence_async();
  }
  ptx::sync_block();
  if (thread >= 128) {
    if (thread != 128) return;
    const int off = fault == kFewerBytes ? -1024 : fault == kMoreBytes ? 1024 : 0;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % Ring::kStages, parity = step / Ring::kStages % 2;
      if (fault != kNoBarrier) ptx::wait_for(shared.empty[stage], parity ^ 1);
      ptx::arrive_expecting(shared.full[stage], Ring::kBytes + off);
      ptx::copy_box(shared.stages[stage].rows, p.map[0], 64 * step, 0, shared.full[stage]);
      ptx::copy_box(shared.stages[stage].columns, p.map[1], 64 * step, 0, shared.full[stage]);
    }
    return;
  }
  float c[8][4];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Ring::kStages, parity = step / Ring::kStages % 2;
    if (fault != kNoWait || step != 1) ptx::wait_for(shared.full[stage], fault == kWrongParity ? parity ^ 1 : parity);
    ptx::begin_products();
    for (int byte = 0; byte < kRowBytes; byte += 32)
      ptx::multiply_add_async<__nv_bfloat16>(c, ptx::matrix_descriptor(shared.stages[stage].rows + byte),
                                             ptx::matrix_descriptor(shared.stages[stage].columns + byte),
                                             step > 0 || byte > 0);
    ptx::commit_products();
    if (fault == kEarlyRelease)
      ptx::wait_for_products<1>(c);
    else
      ptx::wait_for_products<0>(c);
    if (thread % 32 == 0) ptx::arrive(shared.empty[stage]);
    if (fault == kMoreArrivals && thread == 0) ptx::arrive(shared.empty[stage]);
  }
  ptx::wait_for_products<0>(c);
  store_sums(c, p.output<float>());
}

}  // namespace smartclip::micro
