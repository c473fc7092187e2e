// Addresses from Python: checked for what can be checked without looking behind them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace smartclip {

namespace py = pybind11;

using Addresses = std::vector<uintptr_t>;
// One tile as Python sees it: (first row, rows, first column, columns).
using Box = std::tuple<int64_t, int64_t, int64_t, int64_t>;

[[noreturn]] inline void refuse(const std::string& what) {
  throw std::invalid_argument("smartclip_kernels._C: " + what);
}

template <class T>
T* pointer(uintptr_t address, const char* name) {
  if (address % alignof(T) != 0) refuse(std::string(name) + " is not aligned to its numbers");
  return reinterpret_cast<T*>(address);
}

template <class T>
T* required(uintptr_t address, const char* name) {
  if (address == 0) refuse(std::string(name) + " is null");
  return pointer<T>(address, name);
}

// Reads `name` from the keywords as an address; absent: null.
inline uintptr_t address_of(const py::dict& from, const char* name) {
  return from.contains(name) ? from[name].cast<uintptr_t>() : 0;
}

template <class T>
Side<T> side_of(const py::dict& from) {
  Side<T> side;
  side.size = from["size"].cast<int64_t>();
  if (side.size < 1) refuse("a side has no rows");
  side.id = pointer<const int32_t>(address_of(from, "id"), "id");
  side.ignore = pointer<const int32_t>(address_of(from, "ignore"), "ignore");
  side.factor = pointer<const T>(address_of(from, "factor"), "factor");
  side.statistics = pointer<T>(address_of(from, "statistics"), "statistics");
  side.loss = pointer<T>(address_of(from, "loss"), "loss");
  side.tau = pointer<const T>(address_of(from, "tau"), "tau");
  side.ceiling = pointer<const T>(address_of(from, "ceiling"), "ceiling");
  side.weight = pointer<const T>(address_of(from, "weight"), "weight");
  side.anchor = pointer<T>(address_of(from, "anchor"), "anchor");
  side.score_gradient = pointer<T>(address_of(from, "score_gradient"), "score_gradient");
  return side;
}

template <class T>
Problem<T> problem_of(const py::dict& row, const py::dict& column, uintptr_t scale, uintptr_t bias,
                      double label_smoothing, bool factors) {
  Problem<T> problem;
  problem.row = side_of<T>(row);
  problem.column = side_of<T>(column);
  if (factors && !(problem.row.factor && problem.column.factor)) refuse("factor is null");
  if (!problem.row.id != !problem.column.id) refuse("id is given for one side only");
  if (!problem.row.ignore != !problem.column.ignore) refuse("ignore is given for one side only");
  if (!problem.row.ceiling != !problem.column.ceiling) refuse("ceiling is given for one side only");
  problem.scale = required<const T>(scale, "scale");
  problem.bias = pointer<const T>(bias, "bias");
  problem.label_smoothing = static_cast<T>(label_smoothing);
  return problem;
}

template <class T>
void check_box(const Problem<T>& problem, const Box& box) {
  const auto [row, rows, column, columns] = box;
  if (row < 0 || rows < 1 || row + rows > problem.row.size || column < 0 || columns < 1 ||
      column + columns > problem.column.size)
    refuse("the tile lies outside the scores");
}

// `member` of the rows, and of the columns where they are anchors, too.
template <class T, class Member>
void need_both(const Problem<T>& problem, bool both_sides, Member member, const char* name) {
  if (!(problem.row.*member) || (both_sides && !(problem.column.*member))) refuse(std::string(name) + " is null");
}

}  // namespace smartclip
