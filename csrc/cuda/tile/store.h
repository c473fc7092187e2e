// A fragment of float32 numbers into a matrix of the operands' precision.
#pragma once

#include "tile/pairs.h"

namespace smartclip::cuda {

// Words w[0] to w[3] of the four lanes of a quad, transposed: lane t gets word t of every lane, in their order.
SK_DEVICE void transpose_quad(uint32_t (&w)[4]) {
  const int lane = ptx::lane_index();
#pragma unroll
  for (int step = 2; step >= 1; step /= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & step) continue;
      const uint32_t got = ptx::shuffle_xor(upper ? w[k] : w[k + step], step);
      (upper ? w[k] : w[k + step]) = got;
    }
  }
}

// Into `out`, (rows, columns), whose rows start at multiples of 16 bytes and are padded to whole ones.
template <class Config>
SK_DEVICE void store_fragment(const Fragment<Config>& fragment, int accumulator, const Tile& tile, Place place,
                              void* out, int64_t stride) {
  using F = Fragment<Config>;
  using Number = std::conditional_t<Config::kElementBytes == 4, float, typename Config::Element>;
  Number* const matrix = static_cast<Number*>(out);
#pragma unroll
  for (int r = 0; r < F::kRows; ++r) {
    const int row = place.row + F::row(r);
    Number* const line = matrix + row * stride + place.column;
    if constexpr (Config::kElementBytes == 4) {
      // Two numbers a lane: a quad writes whole sectors of 32 bytes.
#pragma unroll
      for (int c = 0; c < F::kColumns; c += 2) {
        const float2 pair{fragment.at(accumulator, r, c), fragment.at(accumulator, r, c + 1)};
        if (row < tile.rows && place.column + F::column(c) < tile.columns)
          *reinterpret_cast<float2*>(line + F::column(c)) = pair;
      }
    } else {
      static_assert(F::kTilesM % 4 == 0, "a quad takes four tiles of 8 columns at a time");
#pragma unroll
      for (int m = 0; m < F::kTilesM; m += 4) {
        uint32_t word[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const Number pair[2] = {ptx::narrow<Number>(fragment.at(accumulator, r, 2 * (m + k))),
                                  ptx::narrow<Number>(fragment.at(accumulator, r, 2 * (m + k) + 1))};
          memcpy(&word[k], pair, sizeof(word[k]));
        }
        transpose_quad(word);
        const int column = F::warp_m() * Config::kWarpM + 8 * (m + ptx::lane_index() % 4);
        if (row < tile.rows && place.column + column < tile.columns)
          *reinterpret_cast<uint4*>(line + column) = uint4{word[0], word[1], word[2], word[3]};
      }
    }
  }
}

}  // namespace smartclip::cuda
