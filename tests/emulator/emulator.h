// What the twins in ptx/ call. Every thread of a block is a fibre of one OS thread; a launch is a loop over blocks.
//
// SMARTCLIP_EMULATOR, read at every launch, chooses among the orders that the machine is free to choose:
//   order=ascending|reverse|random   of the blocks, and of what runs next in one
//   copies=latest|earliest|random    when an engine reads and writes: cp.async, boxes, products of a warpgroup
//   seed=N                           of both
// As in SMARTCLIP_EMULATOR=order=random,copies=random,seed=3. Results must not depend on it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace smartclip::emulator {

// Of a call: the last parameter of a twin, which nobody gives.
struct Where {
  const char* file;
  int line;
};
#define SK_HERE ::smartclip::emulator::Where where = {__builtin_FILE(), __builtin_LINE()}

// Not thread_local, which would ask at every use whether it is initialised. Few bytes, so a module that is loaded late
// has room for them.
#define SK_THREAD_LOCAL __attribute__((tls_model("initial-exec"))) __thread

struct Identity {
  int64_t block = 0;
  int thread = 0, warp = 0, lane = 0;
};

// Of the fibre that runs. A fibre never changes its OS thread, so the compiler may keep the address.
extern SK_THREAD_LOCAL const Identity* identity;

enum class Instruction {
  kShuffle,
  kAny,
  kLoadMatrices,
  kStoreMatrices,
  kSyncWarp,
  kMultiplyBfloat16,
  kMultiplyHalf,
  kMultiplyTf32,
  kSyncBlock,
  kSharedStorage,
  kSharedAddress,
  kCopy,
  kInitBarrier,
  kArrive,
  kWaitFor,
  kSyncThreads,
  kCopyBox,
  kBeginProducts,
  kProduct,
  kCommitProducts,
  kWaitForProducts,
  kGiveRegisters,
  kTakeRegisters
};

// Together: lanes wait for their warp, threads for their block. What calls these is part of the kernel, so the place
// that they return to tells one collective from another.
uint64_t shuffle_xor(uint64_t value, int mask, Where where);
bool any_in_warp(bool value, Where where);
void load_matrices(uint32_t* out, const void* row, Where where);
void store_matrices(const uint32_t* in, void* row, Where where);
void sync_warp(Where where);
void multiply_add(Instruction instruction, float* c, const uint32_t* a, uint32_t b0, uint32_t b1, Where where);
void sync_block(Where where);
int64_t block_count();  // of the launch

// Shared memory.
void* shared_storage(size_t bytes, Where where);
uint32_t shared_address(const void* generic, Where where);
void copy_async_16(void* shared, const void* global, int bytes, Where where);
void commit_copies();
void wait_for_copies(int pending);

// mbarriers, and named ones. `bytes`: that an arrival expects.
void init_barrier(void* barrier, int arrivals, Where where);
void arrive(void* barrier, int bytes, Where where);
void wait_for(void* barrier, int parity, Where where);
void fence_async();
void sync_threads(int barrier, int threads, Where where);

// A matrix of 2-byte numbers in global memory, and boxes of it: box_rows rows of 128 bytes. As large as CUDA's.
struct alignas(64) TensorMap {
  static constexpr int kRowBytes = 128, kNumberBytes = 2;

  const void* matrix;
  int64_t rows, depth, stride;
  int box_rows;
  char unused[84];
};
static_assert(sizeof(TensorMap) == 128, "sizeof(CUtensorMap)");
void copy_box(void* shared, const TensorMap& map, int depth, int row, void* barrier, Where where);

// Products of a warpgroup. c: a thread's 4 * tiles sums. operand_address: from the start of shared memory.
uint32_t operand_address(const void* generic, Where where);
void begin_products(Where where);
void multiply_add_async(bool half, float* c, int tiles, uint64_t rows, uint64_t columns, bool add, Where where);
void commit_products(Where where);
void wait_for_products(float* c, int pending, Where where);
void set_registers(int registers, bool more, Where where);

// Runs body(argument) in every thread of every block. Throws std::runtime_error where a thread does what it must not.
void run(const char* name, int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*),
         const void* argument);

}  // namespace smartclip::emulator
