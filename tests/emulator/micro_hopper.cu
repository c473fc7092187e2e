// Kernels for the wrappers of sm_90a, and faults that must be found. Compiled for the emulator and by nvcc for sm_90a;
// tests/test_emulator_hopper.py calls micro() of either.
#include <ptx/barrier.h>  // not "ptx/…", which would be the emulator's on a device too
#include <ptx/box.h>
#include <ptx/warpgroup.h>

#include <cstdio>

#include "micro.h"

namespace smartclip::micro {

struct Mapped : Parameters {
  ptx::TensorMap map[2];
};

constexpr int kBoxRows = 64, kRowBytes = 128;

// number: rows, depth, stride, and the box's first row (in[1][0]) and depth (in[1][1]). The box as it lies there.
struct OneBox {
  alignas(1024) unsigned char box[kBoxRows * kRowBytes];
  ptx::Barrier barrier;
};
SK_KERNEL(32, 1)
box(SK_PARAMETER Mapped p) {
  OneBox& shared = ptx::shared_storage<OneBox>();
  if (ptx::thread_index() == 0) {
    ptx::init_barrier(shared.barrier, 1);
    ptx::fence_async();
    ptx::arrive_expecting(shared.barrier, static_cast<int>(p.number[3]));
    ptx::copy_box(shared.box, p.map[0], p.input<int>(1)[1], p.input<int>(1)[0], shared.barrier);
  }
  ptx::sync_block();
  ptx::wait_for(shared.barrier, 0);
  for (int i = ptx::thread_index(); i < kBoxRows * kRowBytes; i += 32) p.output<unsigned char>()[i] = shared.box[i];
}

enum Fault : int {
  kNone,
  kNoFence,       // threads write operands, and no fence lets the matrix unit see them
  kNoBegin,       // the sums were the threads'
  kNoWait,        // before the sums are read
  kWrongSwizzle,  // of what threads write
  kDivided,       // other operands in one thread
  kEarlyRelease,  // of a stage that products still read
  kWrongParity,   // the phase before
  kTooFewBytes,
  kTooManyBytes,
  kBarrierNoFence,  // the copy engine does not see the barrier
  kTooManyRegisters,
  kWrongCount,  // of a named barrier's threads
  kArriveTwice,
};

// rows (64, depth) columns (N, depth)^T + start, float32; number: depth in steps of 64, whether there is a start,
// fault.
template <int kColumns>
struct Tiles {
  alignas(1024) unsigned char rows[64 * kRowBytes];
  alignas(1024) unsigned char columns[kColumns * kRowBytes];
};
template <class Element, int kColumns>
SK_KERNEL(128, 1)
product(SK_PARAMETER Parameters p) {
  auto& shared = ptx::shared_storage<Tiles<kColumns>>();
  const int thread = ptx::thread_index(), steps = static_cast<int>(p.number[0]), depth = 64 * steps;
  const int fault = static_cast<int>(p.number[2]);
  const auto row_of = [&](int k) { return thread / 32 * 16 + thread % 32 / 4 + 8 * (k / 2); };
  const auto column_of = [&](int m, int k) { return 8 * m + 2 * (thread % 4) + k % 2; };
  float c[kColumns / 8][4];
  for (int m = 0; m < kColumns / 8; ++m)
    for (int k = 0; k < 4; ++k)
      c[m][k] = p.number[1] ? p.input<float>(2)[row_of(k) * kColumns + column_of(m, k)] : 0.0f;
  for (int step = 0; step < steps; ++step) {
    const auto put = [&](unsigned char* to, const uint16_t* from, int rows) {
      for (int i = thread; i < rows * 8; i += 128) {
        const int row = i / 8, chunk = i % 8, turn = fault == kWrongSwizzle ? 0 : row % 8;
        for (int k = 0; k < 8; ++k)
          reinterpret_cast<uint16_t*>(to + row * kRowBytes + (chunk ^ turn) * 16)[k] =
              from[row * depth + step * 64 + chunk * 8 + k];
      }
    };
    put(shared.rows, p.input<uint16_t>(0), 64);
    put(shared.columns, p.input<uint16_t>(1), kColumns);
    if (fault != kNoFence) ptx::fence_async();
    ptx::sync_block();
    if (fault != kNoBegin) ptx::begin_products();
    for (int byte = 0; byte < kRowBytes; byte += 32) {
      const int other = fault == kDivided && thread == 77 ? 32 - byte % 64 : 0;
      ptx::multiply_add_async<Element>(c, ptx::matrix_descriptor(shared.rows + byte + other),
                                       ptx::matrix_descriptor(shared.columns + byte),
                                       p.number[1] || step > 0 || byte > 0);
    }
    ptx::commit_products();
    if (fault != kNoWait) ptx::wait_for_products<0>(c);
    ptx::sync_block();
  }
  for (int m = 0; m < kColumns / 8; ++m)
    for (int k = 0; k < 4; ++k) p.output<float>()[row_of(k) * kColumns + column_of(m, k)] = c[m][k];
}

// A ring of stages, as the library's: one thread brings boxes, a warpgroup sums rows over the depth by products with
// ones. number: steps of depth, expected bytes less those there are, fault.
struct Ring {
  static constexpr int kStages = 2, kBytes = 2 * 64 * kRowBytes;
  struct {
    alignas(1024) unsigned char rows[64 * kRowBytes], columns[64 * kRowBytes];
  } stages[kStages];
  ptx::Barrier full[kStages], empty[kStages];
};
SK_KERNEL(384, 1)
ring(SK_PARAMETER Mapped p) {
  Ring& shared = ptx::shared_storage<Ring>();
  const int thread = ptx::thread_index(), steps = static_cast<int>(p.number[0]), fault = static_cast<int>(p.number[2]);
  if (thread == 0) {
    for (int k = 0; k < Ring::kStages; ++k) {
      ptx::init_barrier(shared.full[k], 1);
      ptx::init_barrier(shared.empty[k], 4);
    }
    if (fault != kBarrierNoFence) ptx::fence_async();
  }
  ptx::sync_block();
  if (thread >= 256) return;
  if (thread >= 128) {
    if (fault != kTooManyRegisters) ptx::give_registers<24>();
    if (thread != 128) return;
    const int off = fault == kTooFewBytes ? -1024 : fault == kTooManyBytes ? 1024 : 0;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % Ring::kStages, parity = step / Ring::kStages % 2;
      ptx::wait_for(shared.empty[stage], parity ^ 1);
      ptx::arrive_expecting(shared.full[stage], Ring::kBytes + off);
      ptx::copy_box(shared.stages[stage].rows, p.map[0], 64 * step, 0, shared.full[stage]);
      ptx::copy_box(shared.stages[stage].columns, p.map[1], 64 * step, 0, shared.full[stage]);
    }
    return;
  }
  // There are 512 for three warpgroups that began with 168 each.
  if (fault == kTooManyRegisters)
    ptx::take_registers<256>();
  else
    ptx::take_registers<240>();
  float c[8][4];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Ring::kStages, parity = step / Ring::kStages % 2;
    ptx::wait_for(shared.full[stage], fault == kWrongParity ? parity ^ 1 : parity);
    ptx::begin_products();
    for (int byte = 0; byte < kRowBytes; byte += 32)
      ptx::multiply_add_async<__nv_bfloat16>(c, ptx::matrix_descriptor(shared.stages[stage].rows + byte),
                                             ptx::matrix_descriptor(shared.stages[stage].columns + byte),
                                             step > 0 || byte > 0);
    ptx::commit_products();
    if (fault != kEarlyRelease) ptx::wait_for_products<0>(c);
    if (thread % 32 == 0) ptx::arrive(shared.empty[stage]);
    if (fault == kArriveTwice && thread == 0 && step == 0)
      for (int k = 0; k < 5; ++k) ptx::arrive(shared.empty[stage]);
  }
  ptx::wait_for_products<0>(c);
  ptx::sync_threads(1, fault == kWrongCount && thread == 0 ? 160 : 128);
  for (int m = 0; m < 8; ++m)
    for (int k = 0; k < 4; ++k)
      p.output<float>()[(thread / 32 * 16 + thread % 32 / 4 + 8 * (k / 2)) * 64 + 8 * m + 2 * (thread % 4) + k % 2] =
          c[m][k];
}

}  // namespace smartclip::micro

// Returns 0, or 1 with a text in `error`. The kernel has run when this returns, but for a device's own errors.
extern "C" int micro(const char* name, void* const* addresses, const int64_t* numbers, int64_t blocks, char* error,
                     int room) {
  using namespace smartclip;
  using micro::Parameters;
  Parameters p;
  for (int k = 0; k < 3; ++k) p.in[k] = addresses[k];
  p.out = addresses[3];
  for (int k = 0; k < 4; ++k) p.number[k] = numbers[k];
  try {
    const std::string wanted = name;
    const auto mapped = [&](int64_t rows, int64_t depth, int64_t stride) {
      micro::Mapped m;
      static_cast<Parameters&>(m) = p;
      for (int k = 0; k < 2; ++k)
        m.map[k] = ptx::tensor_map<__nv_bfloat16>(p.in[wanted == "box" ? 0 : k], rows, depth, stride, micro::kBoxRows);
      return m;
    };
    const auto product = [&](auto kernel, int columns) {
      cuda::launch("product", kernel, {blocks, 128, 64 * 128 + size_t(columns) * 128}, nullptr, p);
    };
    if (wanted == "box")
      cuda::launch("box", micro::box, {blocks, 32, sizeof(micro::OneBox)}, nullptr,
                   mapped(p.number[0], p.number[1], p.number[2]));
    else if (wanted == "ring")
      cuda::launch("ring", micro::ring, {blocks, 384, sizeof(micro::Ring)}, nullptr,
                   mapped(64, 64 * p.number[0], 64 * p.number[0]));
    else if (wanted == "product_bfloat16_64")
      product(micro::product<__nv_bfloat16, 64>, 64);
    else if (wanted == "product_bfloat16_128")
      product(micro::product<__nv_bfloat16, 128>, 128);
    else if (wanted == "product_bfloat16_256")
      product(micro::product<__nv_bfloat16, 256>, 256);
    else if (wanted == "product_float16_64")
      product(micro::product<__half, 64>, 64);
    else if (wanted == "product_float16_128")
      product(micro::product<__half, 128>, 128);
    else if (wanted == "product_float16_256")
      product(micro::product<__half, 256>, 256);
    else
      throw std::runtime_error("no kernel of this name");
  } catch (const std::exception& caught) {
    std::snprintf(error, static_cast<size_t>(room), "%s", caught.what());
    return 1;
  }
  return 0;
}
