// Beside a backward sweep's tiles: what it knows of a walk's columns, and what it sums over the walk.
#pragma once

#include "sm90/chunks.cuh"

namespace smartclip::cuda::sm90 {

template <class Objective>
SK_DEVICE void load_anchor(const Side<float>& side, int64_t index, float (&anchor)[Objective::kAnchor]) {
#pragma unroll
  for (int k = 0; k < Objective::kAnchor; ++k) anchor[k] = side.anchor[k * side.size + index];
}

// What G of plain pairs needs of a walk's columns: shares with one shift, for the columns and for what rows they meet.
// Shares are finite, and G has all its digits, where shifts are not further than kReach from that.
template <class Config, class Objective>
struct ColumnShares {
  static constexpr float kReach = 40;
  float share[Objective::kBothSides ? Config::kBlockM : 1], even[Objective::kBothSides ? Config::kBlockM : 1];
  float least[4], most[4];  // of the columns' own shifts, by warp

  float shift, furthest;

  SK_DEVICE bool reaches(float other) const { return furthest <= kReach && fabsf(other - shift) <= kReach; }

  // By a whole warpgroup; then a barrier.
  SK_DEVICE void bring(const Scores& p, int first) {
    if constexpr (Objective::kBothSides)
      bring_columns(p, first);
    else if (Warpgroup<Config>::thread() == 0)
      shift = furthest = 0;
  }

 private:
  SK_DEVICE void bring_columns(const Scores& p, int first) {
    float anchor[(Config::kBlockM + Config::kWarpgroup - 1) / Config::kWarpgroup][Objective::kAnchor] = {};
    const float kFar = -device::lowest<float>();
    float least_own = kFar, most_own = -kFar;
    for_own_columns<Config>([&](int k, int column) {
      if (first + column >= p.tile.columns) return;
      load_anchor<Objective>(p.problem.column, p.tile.column + first + column, anchor[k]);
      const float shift = Objective::shift_of(anchor[k]);
      // A NaN is nowhere near.
      least_own = shift == shift ? fminf(least_own, shift) : -kFar;
      most_own = shift == shift ? fmaxf(most_own, shift) : kFar;
    });
    const int warp = Warpgroup<Config>::warp();
    least_own = -Lanes<1, 32>::max(-least_own);
    most_own = Lanes<1, 32>::max(most_own);
    if (ptx::lane_index() == 0) least[warp] = least_own, most[warp] = most_own;
    Warpgroup<Config>::sync();
    const float low = fminf(fminf(least[0], least[1]), fminf(least[2], least[3]));
    const float high = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    for_own_columns<Config>([&](int k, int column) {
      const bool inside = first + column < p.tile.columns;
      share[column] = inside ? Objective::share(anchor[k], low) : 0.0f;
      even[column] = inside ? Objective::even(anchor[k]) : 0.0f;
    });
    if (Warpgroup<Config>::thread() == 0) shift = low, furthest = high - low;
  }
};

// Of G * sim and of G. Long sums of numbers that are alike would lose digits: columns are summed apart, and chunks.
struct ParameterSums {
  float along = 0, total = 0;

  SK_DEVICE void add(float grad, float sim) {
    along = fmaf(grad, sim, along);
    total += grad;
  }
  SK_DEVICE void add(const ParameterSums& other) {
    along += other.along;
    total += other.total;
  }
};

// Sums of G * sim and of G over a walk, of every thread of a warpgroup: in registers they would be in the way.
template <class Config>
struct ParameterTotals {
  double along_sim[Config::kWarpgroup], total[Config::kWarpgroup];

  SK_DEVICE void clear() { along_sim[Warpgroup<Config>::thread()] = total[Warpgroup<Config>::thread()] = 0; }
  SK_DEVICE void add(const ParameterSums& sums) {
    along_sim[Warpgroup<Config>::thread()] += sums.along;
    total[Warpgroup<Config>::thread()] += sums.total;
  }
  // Over the warpgroup, in a fixed order.
  SK_DEVICE void store(double* out) const {
    Warpgroup<Config>::sync();
    if (Warpgroup<Config>::warp() >= 2) return;
    const double* const numbers = Warpgroup<Config>::warp() == 0 ? along_sim : total;
    double sum = 0;
    for (int k = ptx::lane_index(); k < Config::kWarpgroup; k += ptx::kWarp) sum += numbers[k];
    sum = Lanes<1, ptx::kWarp>::sum(sum);
    if (ptx::lane_index() == 0) out[Warpgroup<Config>::warp()] = sum;
  }
};

// Sums over a walk's rows of dL/dsim * sim; nothing where no column has a factor that they are the gradient of.
template <class Config, bool kThere>
struct ColumnScores {
  SK_DEVICE static bool wanted(const Derivative&) { return false; }
  SK_DEVICE void clear() {}
  SK_DEVICE void put(int, float (&)[Config::kChunk]) {}
  SK_DEVICE void put_column(int, float) {}
  SK_DEVICE void add_tile() {}
  SK_DEVICE void store(const Derivative&, const Walk&) const {}
};

template <class Config>
struct ColumnScores<Config, true> {
  WarpSums<Config> of_tile;
  float total[Config::kBlockM];

  SK_DEVICE static bool wanted(const Derivative& p) { return p.column_scores; }
  SK_DEVICE void put(int chunk, float (&along)[Config::kChunk]) { of_tile.put(chunk, along); }
  // Column c of a thread, of which it has a part.
  SK_DEVICE void put_column(int c, float along) {
    along = ColumnLanes::sum(along);
    if (ptx::lane_index() / 4 == 0) of_tile.at(c) = along;
  }

  SK_DEVICE void clear() {
    for_own_columns<Config>([&](int, int column) { total[column] = 0; });
  }
  // By a whole warpgroup, whose warps have put their sums of a tile.
  SK_DEVICE void add_tile() {
    Warpgroup<Config>::sync();
    for_own_columns<Config>([&](int, int column) {
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) total[column] += of_tile.sum[warp][column];
    });
    Warpgroup<Config>::sync();
  }
  SK_DEVICE void store(const Derivative& p, const Walk& walk) const {
    for_own_columns<Config>([&](int, int at) {
      const int column = walk.column_tile * Config::kBlockM + at;
      const int64_t slot = int64_t(Config::kConsumers) * walk.part + Warpgroup<Config>::index();
      if (column < p.tile.columns) p.column_scores[slot * p.tile.columns + column] = total[at];
    });
  }
};

}  // namespace smartclip::cuda::sm90
