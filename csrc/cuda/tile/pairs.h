// Which pairs of a thread's fragment are positive, and which count at all.
#pragma once

#include "kernels.h"
#include "tile/layout.h"

namespace smartclip::cuda {

// A block's tile: its first row and column in the part of the scores that a launch is for.
struct Place {
  int row, column;
};

// Where nearly all tiles are: every pair counts, none is positive. What is decided at compile time costs nothing.
struct PlainPairs {
  SK_DEVICE bool positive(int, int) const { return false; }
  SK_DEVICE bool for_row(int, int, float) const { return true; }
  SK_DEVICE bool for_column(int, int, float) const { return true; }
};

// Row r against column c of a thread's fragment.
template <class Config>
class MixedPairs {
  using F = Fragment<Config>;

 public:
  SK_DEVICE MixedPairs(const Scores& scores, Place place) : scores_(scores), place_(place) {}

  SK_DEVICE bool positive(int r, int c) const {
    return inside(r, c) && scores_.problem.row.id_of(row(r)) == scores_.problem.column.id_of(column(c));
  }
  // Whether the pair counts.
  SK_DEVICE bool for_row(int r, int c, float logit) const {
    return inside(r, c) && (positive(r, c) || !(ignored(r, c) || scores_.problem.row.is_above(row(r), logit)));
  }
  SK_DEVICE bool for_column(int r, int c, float logit) const {
    return inside(r, c) && (positive(r, c) || !(ignored(r, c) || scores_.problem.column.is_above(column(c), logit)));
  }

 private:
  SK_DEVICE bool ignored(int r, int c) const {
    return scores_.problem.row.ignore && scores_.problem.row.ignore[row(r)] == scores_.problem.column.ignore[column(c)];
  }
  SK_DEVICE bool inside(int r, int c) const {
    return place_.row + F::row(r) < scores_.tile.rows && place_.column + F::column(c) < scores_.tile.columns;
  }
  SK_DEVICE int64_t row(int r) const { return scores_.tile.row + place_.row + F::row(r); }
  SK_DEVICE int64_t column(int c) const { return scores_.tile.column + place_.column + F::column(c); }

  const Scores& scores_;
  const Place place_;
};

// Whether any two of a thread's rows and columns have the same id. row_id(r), column_id(c): of those of the tile.
template <class Config, class RowId, class ColumnId>
SK_DEVICE bool any_equal(RowId row_id, ColumnId column_id) {
  using F = Fragment<Config>;
  int32_t column[F::kColumns];
#pragma unroll
  for (int c = 0; c < F::kColumns; ++c) column[c] = column_id(F::column(c));
  bool equal = false;
#pragma unroll
  for (int r = 0; r < F::kRows; ++r) {
    const int32_t row = row_id(F::row(r));
#pragma unroll
    for (int c = 0; c < F::kColumns; ++c) equal |= row == column[c];
  }
  return equal;
}

// Whether all pairs of a warp's part of the tile are plain, by their ids.
template <class Config>
SK_DEVICE bool plain_ids(const Scores& scores, Place place) {
  const Tile& tile = scores.tile;
  const Side<float>&rows = scores.problem.row, &columns = scores.problem.column;
  // The whole tile has to be there, before ids are read.
  if (place.row + Config::kBlockN > tile.rows || place.column + Config::kBlockM > tile.columns) return false;
  const int64_t row = tile.row + place.row, column = tile.column + place.column;
  bool mixed =
      any_equal<Config>([&](int r) { return rows.id_of(row + r); }, [&](int c) { return columns.id_of(column + c); });
  if (rows.ignore)
    mixed |= any_equal<Config>([&](int r) { return rows.ignore[row + r]; },
                               [&](int c) { return columns.ignore[column + c]; });
  return !ptx::any_in_warp(mixed);
}

// Whether all are. A pair above a ceiling is not. logit_at(r, c): of the thread's fragment.
template <class Config, class LogitAt>
SK_DEVICE bool plain_pairs(const Scores& scores, Place place, LogitAt logit_at) {
  if (!plain_ids<Config>(scores, place)) return false;
  const Side<float>&rows = scores.problem.row, &columns = scores.problem.column;
  if (!rows.ceiling) return true;
  using F = Fragment<Config>;
  const int64_t row = scores.tile.row + place.row, column = scores.tile.column + place.column;
  bool above = false;
  for_pairs<Config>([&](int r, int c) {
    const float logit = logit_at(r, c);
    above |= rows.is_above(row + F::row(r), logit) || columns.is_above(column + F::column(c), logit);
  });
  return !ptx::any_in_warp(above);
}

}  // namespace smartclip::cuda
