// One kernel for every wrapper in ptx/, a small matrix product, and faults that must be found. This file is compiled
// for the emulator and by nvcc; tests/test_emulator.py calls micro() of either.
#include <ptx/launch.h>  // not "ptx/…", which would be the emulator's on a device too
#include <ptx/matrix.h>
#include <ptx/number.h>

#include <cstdio>
#include <cstring>
#include <type_traits>

#include "micro.h"

namespace smartclip::micro {

SK_DEVICE int global_index(int threads) { return ptx::block_index() * threads + ptx::thread_index(); }

SK_KERNEL(64, 1)
identities(SK_PARAMETER Parameters p) {
  const int numbers[4] = {ptx::thread_index(), ptx::block_index(), ptx::lane_index(), ptx::warp_index()};
  for (int k = 0; k < 4; ++k) p.output<int>()[4 * global_index(64) + k] = numbers[k];
}

template <class T>
SK_KERNEL(64, 1)
shuffle(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  p.output<T>()[i] = ptx::shuffle_xor(p.input<T>(0)[i], static_cast<int>(p.number[0]));
}

SK_KERNEL(64, 1)
any(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  p.output<int>()[i] = ptx::any_in_warp(p.input<int>(0)[i] != 0);
}

struct Rows {
  alignas(16) uint32_t word[32][4];
};

// Lane l loads with the address of row in[1][l].
SK_KERNEL(32, 1)
load_matrices(SK_PARAMETER Parameters p) {
  Rows& rows = ptx::shared_storage<Rows>();
  const int lane = ptx::lane_index();
  for (int k = 0; k < 4; ++k) rows.word[lane][k] = p.input<uint32_t>(0)[4 * lane + k];
  ptx::sync_block();
  uint32_t out[4];
  ptx::load_matrices(out, rows.word[p.input<int>(1)[lane]]);
  for (int k = 0; k < 4; ++k) p.output<uint32_t>()[4 * lane + k] = out[k];
}

// A lane's registers: four of a, two of b, four of c. number: 1 leaves the rounding out.
template <class Element>
SK_KERNEL(32, 1)
multiply_add(SK_PARAMETER Parameters p) {
  const int lane = ptx::lane_index();
  uint32_t a[4];
  float c[4];
  for (int k = 0; k < 4; ++k) a[k] = p.input<uint32_t>(0)[4 * lane + k];
  for (int k = 0; k < 4; ++k) c[k] = p.input<float>(2)[4 * lane + k];
  uint32_t b[4] = {p.input<uint32_t>(1)[2 * lane], p.input<uint32_t>(1)[2 * lane + 1]};
  if (p.number[0] == 0) {
    ptx::round_operands<Element>(a);
    ptx::round_operands<Element>(b);
  }
  ptx::multiply_add<Element>(c, a, b[0], b[1]);
  for (int k = 0; k < 4; ++k) p.output<float>()[4 * lane + k] = c[k];
}

// Lane l copies in[1][l] bytes. number: what is added to the addresses, for a fault.
SK_KERNEL(32, 1)
copy(SK_PARAMETER Parameters p) {
  Rows& rows = ptx::shared_storage<Rows>();
  const int lane = ptx::lane_index();
  unsigned char* const to = reinterpret_cast<unsigned char*>(rows.word[lane]) + p.number[0];
  ptx::copy_async_16(to, p.input<unsigned char>(0) + 16 * lane + p.number[1], p.input<int>(1)[lane]);
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  ptx::sync_block();
  for (int k = 0; k < 4; ++k) p.output<uint32_t>()[4 * lane + k] = rows.word[lane ^ 1][k];
}

template <class Element>
SK_KERNEL(64, 1)
narrow(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  p.output<Element>()[i] = ptx::narrow<Element>(p.input<float>(0)[i]);
}

SK_KERNEL(64, 1)
round_operands(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  uint32_t x[4];
  for (int k = 0; k < 4; ++k) x[k] = p.input<uint32_t>(0)[4 * i + k];
  ptx::round_operands<ptx::Tf32>(x);
  for (int k = 0; k < 4; ++k) p.output<uint32_t>()[4 * i + k] = x[k];
}

SK_KERNEL(64, 1)
exp2(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  p.output<float>()[i] = ptx::exp2(p.input<float>(0)[i]);
}

SK_KERNEL(64, 1)
square_root(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  p.output<float>()[i] = ptx::square_root(p.input<float>(0)[i]);
}

SK_KERNEL(64, 1)
logarithm(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  p.output<float>()[i] = ptx::log_precise(p.input<float>(0)[i]);
}

SK_KERNEL(64, 1)
logarithm_1p(SK_PARAMETER Parameters p) {
  const int i = global_index(64);
  p.output<float>()[i] = ptx::log1p_precise(p.input<float>(0)[i]);
}

enum class Fault { kNone, kNoBarrierAfterWait, kNoBarrierBeforeCopy, kGroups, kUnwritten, kFragment, kSwizzle };

// out = in[0] in[1]ᵀ, in tiles of 64 × 64 of which a block has one; while a slice of the depth is multiplied, the next
// one is copied. number: rows and columns (multiples of 64), depth (any), numbers from a row to the next.
template <class Element>
struct Product {
  using Multiplied = std::conditional_t<std::is_same_v<Element, float>, ptx::Tf32, Element>;
  static constexpr int kSide = 64, kThreads = 128, kRowBytes = 64, kSize = sizeof(Element);
  static constexpr int kChunk = 16 / kSize, kDepth = kRowBytes / kSize;

  struct Storage {
    alignas(128) unsigned char bytes[2][2][kSide * kRowBytes];  // stages, operands
  };

  template <Fault kFault>
  SK_DEVICE static int offset(int row, int chunk) {
    const int turn = kFault == Fault::kSwizzle ? row : row / 2;
    return row * kRowBytes + ((chunk ^ turn) % 4) * 16;
  }

  SK_DEVICE static void copy(const Parameters& p, Storage& storage, int64_t row, int64_t column, int step) {
    const int64_t depth = p.number[2], stride = p.number[3];
    for (int operand = 0; operand < 2; ++operand)
      for (int i = ptx::thread_index(); i < kSide * 4; i += kThreads) {
        const int64_t k = int64_t(step) * kDepth + i % 4 * kChunk, left = (depth - k) * kSize;
        const Element* const from = p.input<Element>(operand) + ((operand ? column : row) + i / 4) * stride;
        ptx::copy_async_16(storage.bytes[step % 2][operand] + offset<Fault::kNone>(i / 4, i % 4),
                           from + (left > 0 ? k : 0),
                           static_cast<int>(left < 0    ? 0
                                            : left > 16 ? 16
                                                        : left));
      }
  }

  template <Fault kFault>
  SK_DEVICE static void run(const Parameters& p) {
    Storage& storage = ptx::shared_storage<Storage>();
    const int64_t columns = p.number[1], tiles = columns / kSide;
    const int64_t row = ptx::block_index() / tiles * kSide, column = ptx::block_index() % tiles * kSide;
    const int steps = static_cast<int>((p.number[2] + kDepth - 1) / kDepth);
    const int lane = ptx::lane_index(), warp_row = ptx::warp_index() / 2 * 32, warp_column = ptx::warp_index() % 2 * 32;
    float c[2][4][4] = {};
    copy(p, storage, row, column, 0);
    ptx::commit_copies();
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) copy(p, storage, row, column, step + 1);
      ptx::commit_copies();
      ptx::wait_for_copies<kFault == Fault::kGroups ? 2 : 1>();
      if (kFault != Fault::kNoBarrierAfterWait) ptx::sync_block();
      for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4], b[2][4];
        for (int i = 0; i < 2; ++i) {
          const int a_row = warp_row + 16 * i + lane % 16, b_row = warp_column + 16 * i + lane % 8 + lane / 16 * 8;
          ptx::load_matrices(a[i], storage.bytes[step % 2][0] + offset<kFault>(a_row, 2 * half + lane / 16));
          ptx::load_matrices(b[i], storage.bytes[step % 2][1] + offset<kFault>(b_row, 2 * half + lane / 8 % 2));
          ptx::round_operands<Multiplied>(a[i]);
          ptx::round_operands<Multiplied>(b[i]);
        }
        for (int i = 0; i < 2; ++i)
          for (int j = 0; j < 4; ++j)
            ptx::multiply_add<Multiplied>(c[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
      if (kFault != Fault::kNoBarrierBeforeCopy) ptx::sync_block();
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 4; ++j)
        for (int k = 0; k < 4; ++k) {
          if (kFault == Fault::kUnwritten && i == 1 && j == 3 && k == 3) continue;
          const int down = kFault == Fault::kFragment ? k % 2 : k / 2,
                    across = kFault == Fault::kFragment ? k / 2 : k % 2;
          const int64_t r = row + warp_row + 16 * i + lane / 4 + 8 * down;
          const int64_t m = column + warp_column + 8 * j + lane % 4 * 2 + across;
          p.output<float>()[r * columns + m] = c[i][j][k];
        }
  }
};

template <class Element, Fault kFault>
SK_KERNEL(Product<Element>::kThreads, 1)
product(SK_PARAMETER Parameters p) {
  Product<Element>::template run<kFault>(p);
}

struct Numbers {
  float number[256];
};

// Each thread hands a number to the next warp, then a second one. number: 1 has no barrier and ends after the first, 2
// leaves out the barrier between them.
SK_KERNEL(256, 1)
hand_over(SK_PARAMETER Parameters p) {
  Numbers& shared = ptx::shared_storage<Numbers>();
  const int i = ptx::thread_index(), from = (i + 224) % 256;
  shared.number[i] = p.input<float>(0)[i];
  if (p.number[0] != 1) ptx::sync_block();
  const float x = shared.number[from];
  p.output<float>()[i] = x;
  if (p.number[0] == 1) return;
  if (p.number[0] != 2) ptx::sync_block();
  shared.number[i] = 2 * x;
  ptx::sync_block();
  p.output<float>()[i] = shared.number[i ^ 1];
}

// The same within a warp: neither a shuffle nor a vote orders memory.
SK_KERNEL(32, 1)
hand_over_in_warp(SK_PARAMETER Parameters p) {
  Numbers& shared = ptx::shared_storage<Numbers>();
  const int i = ptx::thread_index();
  shared.number[i] = p.input<float>(0)[i];
  if (p.number[0] == 0)
    ptx::sync_block();
  else
    ptx::any_in_warp(true);
  p.output<float>()[i] = shared.number[i ^ 1];
}

// number: how far apart two blocks write; 0 is a race.
SK_KERNEL(32, 1)
two_blocks(SK_PARAMETER Parameters p) {
  ptx::sync_block();
  p.output<float>()[ptx::block_index() * p.number[0] + (ptx::thread_index() + ptx::block_index()) % 32] = 1.0f;
}

// The last block to arrive adds up what all have written. in[0]: a count, 0. numbers: blocks, and 1 for no order.
SK_KERNEL(64, 1)
arrivals(SK_PARAMETER Parameters p) {
  bool& last = ptx::shared_storage<bool>();
  uint32_t* const count = const_cast<uint32_t*>(p.input<uint32_t>(0));
  int* const out = p.output<int>();  // the sum, then a number of each block
  if (ptx::thread_index() == 0) {
    out[1 + ptx::block_index()] = 10 + ptx::block_index();
    last = p.number[1] == 0 ? ptx::arrive_last(count) : (*count)++ == p.number[0] - 1;
  }
  ptx::sync_block();
  if (!last || ptx::thread_index() != 63) return;
  int sum = 0;
  for (int block = 0; block < p.number[0]; ++block) sum += out[1 + block];
  out[0] = sum;
}

// A thread's own copy, read after it was waited for (0) or before (1).
SK_KERNEL(32, 1)
own_copy(SK_PARAMETER Parameters p) {
  Rows& rows = ptx::shared_storage<Rows>();
  const int lane = ptx::lane_index();
  ptx::copy_async_16(rows.word[lane], p.input<uint32_t>(0) + 4 * lane, 16);
  ptx::commit_copies();
  if (p.number[0] == 0) ptx::wait_for_copies<0>();
  p.output<uint32_t>()[lane] = rows.word[lane][0];
  ptx::wait_for_copies<0>();
}

// Lanes part and meet again around each vote, as a compiler would like to keep apart.
SK_KERNEL(64, 1)
parted(SK_PARAMETER Parameters p) {
  const int i = ptx::thread_index();
  const bool low = p.input<int>(0)[i] < 16;
  int x = i;
  if (low) x += 1;
  const bool odd = ptx::any_in_warp(x == 33);
  if (low) x = 2 * x + odd;
  const bool even = ptx::any_in_warp(x == 34);
  if (low)
    x = x * x + even;
  else
    x = x ^ even;
  p.output<int>()[i] = ptx::any_in_warp(x == 100) + x;
}

// The order in which threads come by. The first number starts at -1.
SK_KERNEL(64, 1)
tickets(SK_PARAMETER Parameters p) {
  int* const out = p.output<int>();
  out[1 + ++out[0]] = global_index(64);
}

SK_KERNEL(64, 1)
divided_warp(SK_PARAMETER Parameters p) {
  const int i = ptx::thread_index();
  float x = p.input<float>(0)[i];
  if (i % 32 < 16)
    x = ptx::shuffle_xor(x, 1);
  else
    x = ptx::any_in_warp(x > 0);
  p.output<float>()[i] = x;
}

// The same instruction in two places is a division too.
SK_KERNEL(64, 1)
divided_places(SK_PARAMETER Parameters p) {
  const int i = ptx::thread_index();
  float x = p.input<float>(0)[i];
  if (i % 32 < 16)
    x = ptx::shuffle_xor(x, 1) + 1;
  else
    x = ptx::shuffle_xor(x, 2) * 3;
  p.output<float>()[i] = x;
}

SK_KERNEL(64, 1)
divided_block(SK_PARAMETER Parameters p) {
  if (ptx::warp_index() == 0)
    ptx::sync_block();
  else
    ptx::sync_block();
  p.output<float>()[ptx::thread_index()] = 1;
}

SK_KERNEL(64, 1)
half_a_block(SK_PARAMETER Parameters p) {
  if (ptx::thread_index() < 32) ptx::sync_block();
  p.output<float>()[ptx::thread_index()] = 1;
}

SK_KERNEL(64, 1)
lanes_end(SK_PARAMETER Parameters p) {
  if (ptx::lane_index() < 3) return;
  p.output<int>()[ptx::thread_index()] = ptx::any_in_warp(true);
}

SK_KERNEL(64, 1)
deadlock(SK_PARAMETER Parameters p) {
  if (ptx::thread_index() >= 48)
    p.output<int>()[0] = ptx::any_in_warp(true);
  else
    ptx::sync_block();
}

// number: the byte that thread 5 writes, and the value.
SK_KERNEL(32, 1)
write_shared(SK_PARAMETER Parameters p) {
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(&ptx::shared_storage<unsigned char>());
  if (ptx::thread_index() == 5) bytes[p.number[0]] = static_cast<unsigned char>(p.number[1]);
}

SK_KERNEL(32, 1)
load_anywhere(SK_PARAMETER Parameters p) {
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(&ptx::shared_storage<Rows>());
  uint32_t out[4];
  ptx::load_matrices(out, bytes + p.number[0]);
}

SK_KERNEL(32, 1)
touch(SK_PARAMETER Parameters p) {
  if (ptx::thread_index() == 7) *reinterpret_cast<volatile int*>(p.number[0]) = 1;
}

SK_KERNEL(32, 1)
divide(SK_PARAMETER Parameters p) {
  p.output<int>()[ptx::thread_index()] = static_cast<int>(p.number[0] / (p.number[1] - ptx::thread_index()));
}

// number: how many of a large array's bytes.
SK_KERNEL(32, 1)
large_array(SK_PARAMETER Parameters p) {
  volatile unsigned char bytes[160 * 1024];
  for (int64_t i = 0; i < p.number[0]; ++i) bytes[i] = static_cast<unsigned char>(i);
  p.output<unsigned char>()[ptx::thread_index()] = bytes[p.number[0] - 1];
}

// What shared memory holds when a block begins; each leaves zeros.
SK_KERNEL(32, 1)
left_behind(SK_PARAMETER Parameters p) {
  Numbers& shared = ptx::shared_storage<Numbers>();
  const int i = ptx::thread_index();
  p.output<float>()[ptx::block_index() * 32 + i] = shared.number[i];
  shared.number[i] = 0;
}

struct Kernel {
  const char* name;
  void (*start)(Parameters);
  int threads;
  size_t shared_bytes;
};

template <class Element>
constexpr size_t kProductBytes = sizeof(typename Product<Element>::Storage);

#define SK_PRODUCT(name, Element, kFault) \
  {name, product<Element, Fault::kFault>, Product<Element>::kThreads, kProductBytes<Element>}

const Kernel kKernels[] = {
    {"identities", identities, 64, 0},
    {"shuffle_float", shuffle<float>, 64, 0},
    {"shuffle_uint32", shuffle<uint32_t>, 64, 0},
    {"shuffle_double", shuffle<double>, 64, 0},
    {"shuffle_int64", shuffle<long long>, 64, 0},
    {"any", any, 64, 0},
    {"load_matrices", load_matrices, 32, sizeof(Rows)},
    {"multiply_add_bfloat16", multiply_add<__nv_bfloat16>, 32, 0},
    {"multiply_add_float16", multiply_add<__half>, 32, 0},
    {"multiply_add_tf32", multiply_add<ptx::Tf32>, 32, 0},
    {"copy", copy, 32, sizeof(Rows)},
    {"narrow_float32", narrow<float>, 64, 0},
    {"narrow_bfloat16", narrow<__nv_bfloat16>, 64, 0},
    {"narrow_float16", narrow<__half>, 64, 0},
    {"round_operands", round_operands, 64, 0},
    {"exp2", exp2, 64, 0},
    {"square_root", square_root, 64, 0},
    {"log", logarithm, 64, 0},
    {"log1p", logarithm_1p, 64, 0},
    SK_PRODUCT("product_bfloat16", __nv_bfloat16, kNone),
    SK_PRODUCT("product_float16", __half, kNone),
    SK_PRODUCT("product_tf32", float, kNone),
    SK_PRODUCT("product_no_barrier_after_wait", __half, kNoBarrierAfterWait),
    SK_PRODUCT("product_no_barrier_before_copy", __half, kNoBarrierBeforeCopy),
    SK_PRODUCT("product_groups", __half, kGroups),
    SK_PRODUCT("product_unwritten", __half, kUnwritten),
    SK_PRODUCT("product_fragment", __half, kFragment),
    SK_PRODUCT("product_swizzle", __half, kSwizzle),
    {"hand_over", hand_over, 256, sizeof(Numbers)},
    {"hand_over_in_warp", hand_over_in_warp, 32, sizeof(Numbers)},
    {"two_blocks", two_blocks, 32, 0},
    {"arrivals", arrivals, 64, sizeof(bool)},
    {"own_copy", own_copy, 32, sizeof(Rows)},
    {"tickets", tickets, 64, 0},
    {"parted", parted, 64, 0},
    {"divided_warp", divided_warp, 64, 0},
    {"divided_places", divided_places, 64, 0},
    {"divided_block", divided_block, 64, 0},
    {"half_a_block", half_a_block, 64, 0},
    {"lanes_end", lanes_end, 64, 0},
    {"deadlock", deadlock, 64, 0},
    {"write_shared", write_shared, 32, 1000},
    {"load_anywhere", load_anywhere, 32, sizeof(Rows)},
    {"touch", touch, 32, 0},
    {"divide", divide, 32, 0},
    {"large_array", large_array, 32, 0},
    {"left_behind", left_behind, 32, sizeof(Numbers)},
    {"too_little_shared", hand_over, 256, sizeof(Numbers) - 1},
    {"too_much_shared", hand_over, 256, 227 * 1024 + 1},
    {"odd_threads", identities, 48, 0},
};

}  // namespace smartclip::micro

// pointers: three inputs and the output. 0, or 1 and what was thrown.
extern "C" int micro(const char* name, void* const* pointers, const int64_t* numbers, int64_t blocks, char* error,
                     int error_bytes) {
  using namespace smartclip;
  micro::Parameters parameters{};
  for (int k = 0; k < 3; ++k) parameters.in[k] = pointers[k];
  parameters.out = pointers[3];
  for (int k = 0; k < 4; ++k) parameters.number[k] = numbers[k];
  try {
    for (const micro::Kernel& kernel : micro::kKernels)
      if (std::strcmp(kernel.name, name) == 0) {
        cuda::launch(name, kernel.start, {blocks, kernel.threads, kernel.shared_bytes}, nullptr, parameters);
        return 0;
      }
    throw std::runtime_error(std::string("no kernel is named ") + name);
  } catch (const std::exception& caught) {
    std::snprintf(error, error_bytes, "%s", caught.what());
    return 1;
  }
}
