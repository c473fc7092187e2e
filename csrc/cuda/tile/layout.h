// Where the numbers of a tile are: in shared memory, and in the registers of a thread.
#pragma once

#include "ptx/matrix.h"

namespace smartclip::cuda {

// Rows of kRowBytes in shared memory, in chunks of 16 bytes. Chunks change places within a row, so that the 8 rows of a
// matrix that ldmatrix reads at one depth lie in all 32 banks.
template <int kRowBytes>
SK_DEVICE int swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "two rows, or one, fill the banks");
  constexpr int kChunks = kRowBytes / 16;
  const int turn = kRowBytes == 128 ? row : row / 2;
  return row * kRowBytes + ((chunk ^ turn) % kChunks) * 16;
}

// What a thread has of its block's tile: kRows × kColumns sums of each accumulator, as the matrix unit leaves them.
// Lanes 4 g to 4 g + 3 share rows, lanes t, t + 4, … share columns (tile/reduce.h).
template <class Config>
struct Fragment {
  static constexpr int kTilesN = Config::kWarpN / 16, kTilesM = Config::kWarpM / 8;
  static constexpr int kRows = 2 * kTilesN, kColumns = 2 * kTilesM;

  float sum[Config::kAccumulators][kTilesN][kTilesM][4];

  SK_DEVICE float& at(int accumulator, int r, int c) { return sum[accumulator][r / 2][c / 2][2 * (r % 2) + c % 2]; }
  SK_DEVICE float at(int accumulator, int r, int c) const {
    return sum[accumulator][r / 2][c / 2][2 * (r % 2) + c % 2];
  }

  SK_DEVICE static int warp_n() { return ptx::warp_index() / Config::kWarpsM; }
  SK_DEVICE static int warp_m() { return ptx::warp_index() % Config::kWarpsM; }
  // Row r and column c of the thread, in the block's tile.
  SK_DEVICE static int row(int r) { return warp_n() * Config::kWarpN + r / 2 * 16 + ptx::lane_index() / 4 + r % 2 * 8; }
  SK_DEVICE static int column(int c) {
    return warp_m() * Config::kWarpM + c / 2 * 8 + ptx::lane_index() % 4 * 2 + c % 2;
  }
};

// A thread's fragment in shared memory, where an index may be known at run time only: in registers that takes an
// unrolled loop, and a rare case unrolled would take the registers of the common one.
template <class Config>
struct Parked {
  using F = Fragment<Config>;
  float number[Config::kAccumulators][F::kRows * F::kColumns][Config::kThreads];

  SK_DEVICE float& at(int accumulator, int r, int c) {
    return number[accumulator][r * F::kColumns + c][ptx::thread_index()];
  }
  SK_DEVICE float at(int accumulator, int r, int c) const {
    return number[accumulator][r * F::kColumns + c][ptx::thread_index()];
  }
};

// Calls body(r, c) for all of a fragment, unrolled.
template <class Config, class Body>
SK_DEVICE void for_pairs(Body body) {
  using F = Fragment<Config>;
#pragma unroll
  for (int c = 0; c < F::kColumns; ++c)
#pragma unroll
    for (int r = 0; r < F::kRows; ++r) body(r, c);
}

template <class Config>
SK_DEVICE void park(const Fragment<Config>& fragment, Parked<Config>& parked) {
#pragma unroll
  for (int k = 0; k < Config::kAccumulators; ++k)
    for_pairs<Config>([&](int r, int c) { parked.at(k, r, c) = fragment.at(k, r, c); });
}

template <class Config>
SK_DEVICE void unpark(const Parked<Config>& parked, Fragment<Config>& fragment) {
#pragma unroll
  for (int k = 0; k < Config::kAccumulators; ++k)
    for_pairs<Config>([&](int r, int c) { fragment.at(k, r, c) = parked.at(k, r, c); });
}

}  // namespace smartclip::cuda
