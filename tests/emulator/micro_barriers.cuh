// Micro-kernels of boxes, mbarriers, named barriers and registers; and their faults.
#pragma once

#include <ptx/barrier.h>  // not "ptx/…", which would be the emulator's on a device too
#include <ptx/box.h>
#include <ptx/warpgroup.h>

#include "micro.h"

namespace smartclip::micro {

constexpr int kBoxRows = 64, kMostBoxRows = 256, kRowBytes = 128;

struct Mapped : Parameters {
  ptx::TensorMap map[2];
};

// Of all kernels; tests/test_emulator_hopper.py names them in this order.
enum Fault : int {
  kNone,
  kNoFence,  // after what threads wrote, or after the barriers were initialised
  kNoInit,   // of a barrier
  kInitTwice,
  kWrongPlace,   // of a box: no multiple of 1,024
  kOverwritten,  // a barrier, by a thread
  kNoWait,       // before what is waited for is used
  kNeverWait,
  kNoBarrier,    // of the block, or the named one
  kWrongParity,  // the phase before
  kMoreArrivals,
  kFewerBytes,
  kMoreBytes,
  kWrongCount,  // of a named barrier's threads
  kWrongNumber,
  kDivided,
  kLeaves,   // a thread, before the others are through
  kTooMany,  // registers
  kTooFew,
  kBadNumber,
  kNoBegin,
  kNoCommit,
  kTouchedBefore,  // sums, after begin_products
  kTouchedAfter,   // after the products were issued
  kOtherSums,      // are handed to the wait
  kWrongSwizzle,   // of what threads write
  kOverlap,        // sums of two products, or boxes
  kEarlyRelease,   // of a stage that products still read
};

// number: rows, depth, stride, rows of a box. in[1]: the box's first row and depth, the bytes that are expected,
// whether that is said after the copy began, fault. The box as it lies there.
struct OneBox {
  alignas(1024) unsigned char box[kMostBoxRows * kRowBytes];
  ptx::Barrier barrier;
};
SK_KERNEL(32, 1)
box(SK_PARAMETER Mapped p) {
  OneBox& shared = ptx::shared_storage<OneBox>();
  const int* const given = p.input<int>(1);
  const int fault = fault_of(given[4]), bytes = static_cast<int>(p.number[3]) * kRowBytes;
  if (ptx::thread_index() == 0) {
    ptx::prefetch_map(p.map[0]);
    if (fault == kOverlap) shared.box[5] = 0;
    if (fault != kNoInit) ptx::init_barrier(shared.barrier, 1);
    if (fault == kInitTwice) ptx::init_barrier(shared.barrier, 1);
    if (fault != kNoFence && fault != kOverlap) ptx::fence_async();
    if (fault == kOverlap) ptx::fence_async(), shared.box[6] = 0;
    if (fault == kOverwritten) shared.barrier.bits = 0;
    if (!given[3]) ptx::arrive_expecting(shared.barrier, given[2]);
    ptx::copy_box(shared.box + (fault == kWrongPlace ? 512 : 0), p.map[0], given[1], given[0], shared.barrier);
    if (given[3]) ptx::arrive_expecting(shared.barrier, given[2]);
    if (fault == kMoreArrivals) ptx::arrive(shared.barrier);
  }
  if (fault != kNoBarrier) ptx::sync_block();
  if (fault != kNoWait && fault != kNeverWait) ptx::wait_for(shared.barrier, 0);
  for (int i = ptx::thread_index(); i < bytes && fault != kNeverWait; i += 32)
    p.output<unsigned char>()[i] = shared.box[i];
  if (fault == kNoWait) ptx::wait_for(shared.barrier, 0);
}

// Warp 0 hands numbers to warp 1, one place for all of them. number: steps, fault. Every number that arrived.
struct HandOver {
  int place[32];
  ptx::Barrier full, empty;
};
SK_KERNEL(64, 1)
phases(SK_PARAMETER Parameters p) {
  HandOver& shared = ptx::shared_storage<HandOver>();
  const int lane = ptx::lane_index(), steps = static_cast<int>(p.number[0]), fault = fault_of(p.number[1]);
  if (ptx::thread_index() == 0) {
    ptx::init_barrier(shared.full, 32);
    ptx::init_barrier(shared.empty, 1);
  }
  ptx::sync_block();
  for (int step = 0; step < steps; ++step) {
    const int parity = step % 2, wrong = fault == kWrongParity;
    if (ptx::warp_index() == 0) {
      if (fault != kNoWait) ptx::wait_for(shared.empty, parity ^ 1);
      shared.place[lane] = p.input<int>(0)[step * 32 + lane];
      ptx::arrive(shared.full);
      if (fault == kMoreArrivals && lane == 0) ptx::arrive(shared.full);
    } else {
      ptx::wait_for(shared.full, parity ^ wrong);
      p.output<int>()[step * 32 + lane] = shared.place[lane ^ 1];
      ptx::sync_warp();
      if (lane == 0) ptx::arrive(shared.empty);
    }
  }
}

// Each half of the block turns its numbers round, the second half more often; then the first half's last warp hands
// its own to the second half's first, which waits elsewhere. number: fault.
SK_KERNEL(128, 1)
named(SK_PARAMETER Parameters p) {
  struct Numbers {
    int half[2][64];
  };
  Numbers& shared = ptx::shared_storage<Numbers>();
  const int thread = ptx::thread_index(), half = thread / 64, place = thread % 64;
  const int fault = fault_of(p.number[0]);
  int x = p.input<int>(0)[thread];
  if (fault == kDivided && half == 0 && ptx::lane_index() < 16) ptx::sync_threads(4, 32);
  for (int round = 0; round < 3 + 2 * half; ++round) {
    shared.half[half][place] = x;
    if (fault == kLeaves && thread == 40) return;
    const bool odd = thread == 70;
    const int number = fault == kWrongNumber && odd ? 16 : 1 + half;
    const int threads = fault == kWrongCount && odd ? 96 : fault == kBadNumber ? 48 : 64;
    if (fault != kNoBarrier || round != 1) ptx::sync_threads(number, threads);
    x = shared.half[half][(place + 40) % 64] + 1;
    ptx::sync_threads(1 + half, 64);
  }
  if (ptx::warp_index() == 1) {
    shared.half[0][place] = x;
    ptx::sync_threads(3, 64);
  }
  if (ptx::warp_index() == 2) {
    ptx::sync_threads(3, 64);
    x += shared.half[0][32 + place];
  }
  p.output<int>()[thread] = x;
}

// The third warpgroup gives registers, the others take them; each thread tells that it went on. number: fault.
SK_KERNEL(384, 1)
registers(SK_PARAMETER Parameters p) {
  const int thread = ptx::thread_index(), fault = fault_of(p.number[0]);
  if (thread >= 256) {
    if (fault == kDivided && thread == 300) ptx::give_registers<40>();
    if (fault == kTooFew) ptx::give_registers<176>();
#ifndef __CUDACC__  // whose assembler refuses it
    if (fault == kBadNumber) ptx::give_registers<20>();
#endif
    if (fault != kTooMany) ptx::give_registers<24>();
  } else {
    if (fault == kTooFew) ptx::take_registers<160>();
    ptx::take_registers<240>();
  }
  p.output<int>()[thread] = thread;
}

}  // namespace smartclip::micro
