// How a loop walks a tile: packs of columns, rows in parts, and what a pair of a row and a pack is.
#pragma once

#include <new>

#include "kernels.h"
#include "parallel.h"

// The formulas call what the pack defines, so it stands before them.
#include "pack.h"
//
#include "../objective.h"
#include "../similarity.h"

namespace smartclip::SK_ISA {

template <class T>
T minimum(T a, T b) {
  return b < a ? b : a;
}

// Calls body(column, count) for packs of columns; count is a constant for all but the last.
template <class T, class Body>
void for_packs(int64_t begin, int64_t end, Body body) {
  constexpr int kLanes = Pack<T>::kLanes;
  int64_t column = begin;
  for (; column + kLanes <= end; column += kLanes) body(column, std::integral_constant<int, kLanes>());
  if (column < end) body(column, static_cast<int>(end - column));
}

// Calls body(part, begin, end) for contiguous parts of [0, size), on several threads.
template <class Body>
void for_parts(int64_t size, int parts, Body body) {
  auto run = [&](int part) { body(part, size * part / parts, size * (part + 1) / parts); };
  parallel(parts, run);
}

// Parts that a loop over `size` things makes of a tile: no more than threads, and each worth waking a thread for.
template <class T>
int parts_of(const Tile<T>& tile, int64_t size, int threads) {
  constexpr int64_t kPairsWorthAThread = 8192;
  const int64_t worth = tile.rows * tile.columns / kPairsWorthAThread + 1;
  return static_cast<int>(minimum(minimum<int64_t>(size, threads), worth));
}

template <class T>
Mask<T> first_lanes(int count) {
  if (count == Pack<T>::kLanes) return Mask<T>::all();
  typename Mask<T>::Vector lanes{};
  for (int lane = 0; lane < count; ++lane) lanes[lane] = -1;
  return {lanes};
}

template <class T>
constexpr T kNoCeiling = std::numeric_limits<T>::infinity();

// A row of the tile, its numbers in every lane.
template <class T>
struct Row {
  Pack<T> factor, ceiling;
  int32_t id, ignore;

  Row(const Side<T>& side, int64_t index)
      : factor(side.factor ? side.factor[index] : T(0)),
        ceiling(side.ceiling ? side.ceiling[index] : kNoCeiling<T>),
        id(side.id_of(index)),
        ignore(side.ignore ? side.ignore[index] : 0) {}
};

// A row against a pack of columns. `kSwapped`: the rows are texts, the columns images.
template <class T, class Similarity, bool kSwapped = false>
struct Products {
  using V = Pack<T>;
  V accumulator[Similarity::kAccumulators], row, column;

  Products(const Problem<T>& problem, const Tile<T>& tile, const Row<T>& row, int64_t r, int64_t c, int count)
      : row(row.factor), column(T(0)) {
    for (int k = 0; k < Similarity::kAccumulators; ++k)
      accumulator[k] = V::load(tile.accumulator[k] + r * tile.accumulator_stride + c, count);
    if constexpr (Similarity::kFactors) column = V::load(problem.column.factor + tile.column + c, count);
    if constexpr (kSwapped) {
      const V text = this->row;
      this->row = column;
      column = text;
    }
  }
  V sim() const { return Similarity::value(accumulator, row, column); }

  // dL/dsim -> dL/daccumulator, into the tile's output
  void store_derivative(const Tile<T>& tile, V sim, V grad_sim, int64_t r, int64_t c, int count) const {
    V grad[Similarity::kAccumulators];
    Similarity::derivative(accumulator, row, column, sim, grad_sim, grad);
    for (int k = 0; k < Similarity::kAccumulators; ++k) grad[k].store(tile.out[k] + r * tile.out_stride + c, count);
  }
};

// Which pairs of a row and a pack are positive, and which count, for either side. kAll: all do.
template <class T, bool kAll>
struct Pairs {
  using V = Pack<T>;
  Mask<T> positive, candidate;
  V row_ceiling, column_ceiling;

  Pairs(const Problem<T>& problem, const Tile<T>& tile, const Row<T>& row, int64_t c, int count) {
    const Mask<T> inside = first_lanes<T>(count);
    positive = (Ids<T>::load(problem.column.id, tile.column + c, count) == row.id) & inside;
    candidate = inside;
    if constexpr (!kAll) {
      if (problem.column.ignore) {
        const Mask<T> ignored = Ids<T>::load(problem.column.ignore + tile.column + c, count) == row.ignore;
        candidate = inside & (positive | ~ignored);
      }
      row_ceiling = row.ceiling;
      column_ceiling =
          problem.column.ceiling ? V::load(problem.column.ceiling + tile.column + c, count) : V(kNoCeiling<T>);
    }
  }

  Mask<T> for_row(V logit) const { return below(logit, row_ceiling); }
  Mask<T> for_columns(V logit) const { return below(logit, column_ceiling); }

 private:
  // "Is not above": a NaN compares false and must stay visible.
  Mask<T> below(V logit, V ceiling) const {
    if constexpr (kAll)
      return candidate;
    else
      return candidate & (positive | ~(logit > ceiling));
  }
};

// Aligned memory for packs; not cleared.
template <class Item>
struct Scratch {
  Item* items;
  explicit Scratch(int64_t count)
      : items(static_cast<Item*>(::operator new(sizeof(Item) * count, std::align_val_t(alignof(Item))))) {}
  ~Scratch() { ::operator delete(items, std::align_val_t(alignof(Item))); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace smartclip::SK_ISA
