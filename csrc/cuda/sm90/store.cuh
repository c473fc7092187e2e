// A warp's fragment into a matrix of the operands' precision, by lines of 128 bytes.
#pragma once

#include "sm90/chunks.cuh"

namespace smartclip::cuda::sm90 {

// Into `out`, (rows, columns), whose rows start at multiples of 16 bytes and are padded to whole ones. 64 columns at a
// time lie in the warp's shared memory, swizzled, for lanes to take whole chunks of a row.
template <class Config>
SK_DEVICE void store_fragment(const Fragment<Config>& fragment, int accumulator, const Tile& tile, Place place,
                              void* out, int64_t stride, ParkedChunk<Config>& parked) {
  using Element = typename Config::Element;
  constexpr int kColumns = 64, kRowBytes = 2 * kColumns;
  static_assert(sizeof(parked.own()) >= Config::kWarpN * kRowBytes, "room for 16 rows");
  unsigned char* const lines = reinterpret_cast<unsigned char*>(&parked.own());
  const int lane = ptx::lane_index(), first_row = place.row + Fragment<Config>::warp_n() * Config::kWarpN;
#pragma unroll
  for (int first = 0; first < Config::kBlockM; first += kColumns) {
    ptx::sync_warp();
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {  // rows g and g + 8 of 8 columns, then of the next 8
        const float* const two = &fragment.sum[accumulator][0][first / 8 + 2 * i + k / 2][2 * (k % 2)];
        const Element pair[2] = {ptx::narrow<Element>(two[0]), ptx::narrow<Element>(two[1])};
        memcpy(&word[k], pair, sizeof(word[k]));
      }
      const int row = lane / 8 % 2 * 8 + lane % 8, chunk = 2 * i + lane / 16;
      ptx::store_matrices(word, lines + swizzled<kRowBytes>(row, chunk));
    }
    ptx::sync_warp();
#pragma unroll
    for (int k = 0; k < Config::kWarpN / 4; ++k) {
      const int row = 4 * k + lane / 8, chunk = lane % 8, column = place.column + first + 8 * chunk;
      const uint4 numbers = *reinterpret_cast<const uint4*>(lines + swizzled<kRowBytes>(row, chunk));
      if (first_row + row < tile.rows && column < tile.columns)
        *reinterpret_cast<uint4*>(static_cast<Element*>(out) + (first_row + row) * stride + column) = numbers;
    }
  }
  ptx::sync_warp();
}

}  // namespace smartclip::cuda::sm90
