// The loops without an objective: scores themselves, and searches through them.
#pragma once

#include "tile.h"

namespace smartclip::SK_ISA {

template <class T, class Similarity>
void similarity(const Problem<T>& problem, const Tile<T>& tile, int threads) {
  for_parts(tile.rows, parts_of(tile, tile.rows, threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row(problem.row, tile.row + r);
      for_packs<T>(0, tile.columns, [&](int64_t c, auto count) {
        const Products<T, Similarity> products(problem, tile, row, r, c, count);
        products.sim().store(tile.out[0] + r * tile.out_stride + c, count);
      });
    }
  });
}

template <class T, class Similarity>
void derivative(const Problem<T>& problem, const Tile<T>& tile, const T* grad_sim, int threads) {
  using V = Pack<T>;
  // In column order for every thread count: parts are columns, so that no sum is split.
  const int64_t packs = (tile.columns + V::kLanes - 1) / V::kLanes;
  for_parts(packs, parts_of(tile, packs, threads), [&](int, int64_t begin, int64_t end) {
    const int64_t first = begin * V::kLanes, last = minimum(end * V::kLanes, tile.columns);
    T* const sums = problem.column.score_gradient;
    if (sums && tile.row == 0)
      for (int64_t c = first; c < last; ++c) sums[tile.column + c] = 0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const Row<T> row(problem.row, tile.row + r);
      for_packs<T>(first, last, [&](int64_t c, auto count) {
        const Products<T, Similarity> products(problem, tile, row, r, c, count);
        const V sim = products.sim();
        const V grad = V::load(grad_sim + r * tile.columns + c, count);
        if (sums) (V::load(sums + tile.column + c, count) + grad * sim).store(sums + tile.column + c, count);
        products.store_derivative(tile, sim, grad, r, c, count);
      });
    }
  });
}

// NaN before all numbers, so that it is seen.
template <class T>
bool better(T a, T b) {
  return a > b || (a != a && b == b);
}

// Calls body(row, lanes of sim, column, count) for every pack of every row.
template <class T, class Similarity, bool kSwapped, class Body>
void for_scores(const Problem<T>& problem, const Tile<T>& tile, int threads, Body body) {
  for_parts(tile.rows, parts_of(tile, tile.rows, threads), [&](int, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row(problem.row, tile.row + r);
      for_packs<T>(0, tile.columns, [&](int64_t c, auto count) {
        body(row, tile.row + r, Products<T, Similarity, kSwapped>(problem, tile, row, r, c, count).sim(), c, count);
      });
    }
  });
}

template <class T, class Similarity, bool kSwapped>
void topk_of(const Problem<T>& problem, const Tile<T>& tile, const Best<T>& best, int threads) {
  using V = Pack<T>;
  for_scores<T, Similarity, kSwapped>(
      problem, tile, threads, [&](const Row<T>&, int64_t r, V sim, int64_t c, int count) {
        T* const value = best.value + r * best.k;
        int64_t* const index = best.index + r * best.k;
        int64_t filled = minimum(best.k, tile.column + c);
        // Written so that NaN passes.
        if (filled == best.k && !any(~(sim <= V(value[best.k - 1])) & first_lanes<T>(count))) return;
        for (int lane = 0; lane < count; ++lane) {
          const T candidate = sim.v[lane];
          if (filled == best.k && !better(candidate, value[best.k - 1])) continue;
          int64_t at = filled < best.k ? filled++ : best.k - 1;
          for (; at > 0 && better(candidate, value[at - 1]); --at) {
            value[at] = value[at - 1];
            index[at] = index[at - 1];
          }
          value[at] = candidate;
          index[at] = tile.column + c + lane;
        }
      });
}

template <class T, class Similarity, bool kSwapped>
void best_positive_of(const Problem<T>& problem, const Tile<T>& tile, const Best<T>& best, int threads) {
  using V = Pack<T>;
  for_scores<T, Similarity, kSwapped>(
      problem, tile, threads, [&](const Row<T>& row, int64_t r, V sim, int64_t c, int count) {
        if (tile.column + c == 0) {
          best.value[r] = -std::numeric_limits<T>::infinity();
          best.index[r] = -1;
        }
        const Mask<T> positive = Ids<T>::load(problem.column.id, tile.column + c, count) == row.id;
        if (!any(positive & first_lanes<T>(count))) return;
        for (int lane = 0; lane < count; ++lane) {
          if (!positive.v[lane] || (best.index[r] >= 0 && !better<T>(sim.v[lane], best.value[r]))) continue;
          best.value[r] = sim.v[lane];
          best.index[r] = tile.column + c + lane;
        }
      });
}

// 1 + how many candidates are not worse than the best positive, which comes before its equals of higher index.
template <class T, class Similarity, bool kSwapped>
void rank_of(const Problem<T>& problem, const Tile<T>& tile, const Best<T>& best, int64_t* ranks, int threads) {
  using V = Pack<T>;
  for_scores<T, Similarity, kSwapped>(problem, tile, threads,
                                      [&](const Row<T>&, int64_t r, V sim, int64_t c, int count) {
                                        const int64_t column = tile.column + c;
                                        if (column == 0) ranks[r] = 1;
                                        if (best.index[r] < 0) {
                                          ranks[r] += count;
                                          return;
                                        }
                                        const V positive(best.value[r]);
                                        const Mask<T> inside = first_lanes<T>(count);
                                        Mask<T> not_worse = ~(sim < positive) & inside;
                                        const Mask<T> tie = (sim == positive) & inside;
                                        if (!any(not_worse)) return;
                                        for (int lane = 0; lane < count; ++lane) {
                                          const bool behind = tie.v[lane] && column + lane > best.index[r];
                                          ranks[r] += not_worse.v[lane] && !behind && column + lane != best.index[r];
                                        }
                                      });
}

template <class T, class Similarity>
void topk(const Problem<T>& problem, const Tile<T>& tile, bool swapped, const Best<T>& best, int threads) {
  (swapped ? topk_of<T, Similarity, true> : topk_of<T, Similarity, false>)(problem, tile, best, threads);
}

template <class T, class Similarity>
void best_positive(const Problem<T>& problem, const Tile<T>& tile, bool swapped, const Best<T>& best, int threads) {
  (swapped ? best_positive_of<T, Similarity, true> : best_positive_of<T, Similarity, false>)(problem, tile, best,
                                                                                             threads);
}

template <class T, class Similarity>
void rank(const Problem<T>& problem, const Tile<T>& tile, bool swapped, const Best<T>& best, int64_t* ranks,
          int threads) {
  (swapped ? rank_of<T, Similarity, true> : rank_of<T, Similarity, false>)(problem, tile, best, ranks, threads);
}

}  // namespace smartclip::SK_ISA
