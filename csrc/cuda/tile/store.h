// A fragment of float32 numbers into a matrix of the operands' precision, or of its own and back.
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

// Calls body(pair of columns c and c + 1 of row r, where they are) for a fragment's place in `matrix`, (rows, columns),
// whose rows have an even stride. Two numbers a lane: a quad has whole sectors of 32 bytes.
template <class Config, class Body>
SK_DEVICE void for_number_pairs(const Tile& tile, Place place, float* matrix, int64_t stride, Body body) {
  using F = Fragment<Config>;
#pragma unroll
  for (int r = 0; r < F::kRows; ++r) {
    const int row = place.row + F::row(r);
#pragma unroll
    for (int c = 0; c < F::kColumns; c += 2) {
      const int column = place.column + F::column(c);
      const bool inside = row < tile.rows && column < tile.columns;
      body(r, c, inside ? reinterpret_cast<float2*>(matrix + row * stride + column) : nullptr);
    }
  }
}

template <class Config>
SK_DEVICE void store_numbers(const Fragment<Config>& fragment, int accumulator, const Tile& tile, Place place,
                             float* out, int64_t stride) {
  for_number_pairs<Config>(tile, place, out, stride, [&](int r, int c, float2* pair) {
    if (pair) *pair = float2{fragment.at(accumulator, r, c), fragment.at(accumulator, r, c + 1)};
  });
}

// The products of a tile, to where they are kept.
template <class Config>
SK_DEVICE void keep(const Fragment<Config>& fragment, const Scores& p, Place place) {
  if (!p.kept.matrix[0]) return;
#pragma unroll
  for (int k = 0; k < Config::kAccumulators; ++k)
    store_numbers(fragment, k, p.tile, place, p.kept.matrix[k], p.kept.stride);
}

// And back. Outside of the part they are 0, as products are.
template <class Config>
SK_DEVICE void bring_kept(Fragment<Config>& fragment, const Scores& p, Place place) {
#pragma unroll
  for (int k = 0; k < Config::kAccumulators; ++k)
    for_number_pairs<Config>(p.tile, place, p.kept.matrix[k], p.kept.stride, [&](int r, int c, const float2* pair) {
      const float2 numbers = pair ? *pair : float2{0, 0};
      fragment.at(k, r, c) = numbers.x;
      fragment.at(k, r, c + 1) = numbers.y;
    });
}

// Into `out`, (rows, columns), whose rows start at multiples of 16 bytes and are padded to whole ones.
template <class Config>
SK_DEVICE void store_fragment(const Fragment<Config>& fragment, int accumulator, const Tile& tile, Place place,
                              void* out, int64_t stride) {
  using F = Fragment<Config>;
  if constexpr (Config::kElementBytes == 4) {
    store_numbers(fragment, accumulator, tile, place, static_cast<float*>(out), stride);
  } else {
    using Number = typename Config::Element;
    static_assert(F::kTilesM % 4 == 0, "a quad takes four tiles of 8 columns at a time");
#pragma unroll
    for (int r = 0; r < F::kRows; ++r) {
      const int row = place.row + F::row(r);
      Number* const line = static_cast<Number*>(out) + row * stride + place.column;
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
