// The launches of the CUDA backend: what each takes, and who makes them. No CUDA header here.
#pragma once

#include <string>

#include "../problem.h"

namespace smartclip::cuda {

using Stream = void*;  // a cudaStream_t

// One side's panel: a matrix for every factor that a product has on that side.
struct Operands {
  static constexpr int kMost = 4;
  const void* matrix[kMost] = {};
  int64_t stride = 0;  // numbers from one row to the next; rows start at multiples of 16 bytes
};

// A part of the scores. Its vectors are those of the whole problem, its operands those of the part alone.
struct Tile {
  int64_t row = 0, column = 0;  // first
  int rows = 0, columns = 0, depth = 0;
  Operands row_operands, column_operands;
  const int32_t* inexact = nullptr;  // on the device: not 0 where low halves of the columns' operands count
};

// The products of a part, where they are kept from the forward sweep for the backward one.
struct Kept {
  float* matrix[2] = {};  // (rows, columns), one for each accumulator; null: not kept
  int64_t stride = 0;     // an even number
};

// What every kernel of scores takes. A walk is a tile of one side and one of `parts` runs of tiles of the other.
struct Scores {
  Problem<float> problem;
  Tile tile;
  Kept kept;  // written by statistics, read by gradient
  int tiles_a_walk = 1, parts = 1;
  uint32_t* arrived = nullptr;  // set to 0, for gather(); may be null
};

struct Statistics : Scores {
  float* row_partials = nullptr;     // (planes, slots of rows, rows)
  float* column_partials = nullptr;  // (planes, slots of columns, columns)
};

// dL/daccumulator, in the operands' precision, and sums of the numbers before they were rounded.
struct Derivative : Scores {
  const float* grad_sim = nullptr;  // (rows, columns), dense: dL/dsim, where it is given
  const float* unit = nullptr;      // what it is divided by; null: 1
  void* out[2] = {};                // (rows, columns); rows start at multiples of 16 bytes
  int64_t out_stride = 0;
  float* column_scores = nullptr;  // (slots of columns, columns): sums over rows of dL/dsim * sim; may be null
};

struct Gradient : Derivative {
  double* parameters = nullptr;   // (slots of all, 2): sums of G * sim and of G
  float* row_partials = nullptr;  // as for Statistics; null where statistics are not asked for
};

struct Search : Scores {
  enum What : int { kSim, kKeys, kBestPositive, kAhead };
  What what = kSim;
  bool per_column = false;  // anchors are columns, candidates rows
  int64_t first = 0;        // index of the first candidate
  void* out = nullptr;      // kSim float32, kKeys int64, by strides; else (slots of anchors, anchors), int64 or int32
  int64_t row_stride = 0, column_stride = 0;
  const int64_t* best = nullptr;  // kAhead: key of each of the tile's anchors
};

// Partial states of a panel of one side, and how they are merged: into what is there, unless they are the first.
struct Partials {
  const float* states = nullptr;  // (planes, slots, count)
  int slots = 0, count = 0;       // no anchors: count is 0
  int64_t start = 0;              // of the side's anchors
  bool first = false;
};

// Of a block's anchors.
struct LossSum {
  double loss, anchors;
};

enum class Reduction : int { kNone, kSum, kMean };

struct Gather {
  Side<float> row, column;
  Partials row_partials, column_partials;
  const float *scale = nullptr, *bias = nullptr;
  float smoothing = 0;
  LossSum* sums = nullptr;  // of every kVectorThreads rows, then columns; null: losses are not summed
  // Of the whole problem, after its last part: the loss (one number), and what each side's losses count in it (two).
  Reduction reduction = Reduction::kNone;
  double shares[2] = {0.5, 0.5};  // of rows and columns where both have losses; a side of share 0 is left out
  float *loss = nullptr, *weights = nullptr;
  uint32_t* arrived = nullptr;
};

// In half precision weights are divided by a unit, and `gain` is scale times that.
struct Anchors {
  Side<float> row, column;  // where only rows are anchors, the columns' size is 0
  bool uniform = false;     // a side's weights are one number
  float* unit = nullptr;    // null: 1. Made here of uniform weights, else given
  float room = 1;           // what the largest weight becomes
  const float *scale = nullptr, *bias = nullptr;
  float* gain = nullptr;
  float smoothing = 0;
};

struct Unit {
  const float* x[2] = {};
  int64_t size[2] = {};
  float room = 1;  // what the largest becomes
  float* unit = nullptr;
  const float* scale = nullptr;
  float* gain = nullptr;  // scale times unit; may be null
};

struct ParameterGradient {
  const double* sums = nullptr;  // (count, 2)
  int64_t count = 0;
  const float* unit = nullptr;              // null: 1
  float *scale = nullptr, *bias = nullptr;  // either may be null
};

// How many results a kernel leaves of each row, of each column, and of all scores.
struct Slots {
  int64_t of_rows = 0, of_columns = 0, of_all = 0;
};

// How the scores of a part are shared out among blocks.
struct Plan {
  int row_tiles = 0, column_tiles = 0;
  int tiles_a_walk = 0, parts = 0;
  int64_t blocks = 0;
  Slots slots, search_slots;
  bool narrow = false;  // tiles of fewer columns, where wide ones would be too few
};

// What a block of a kernel takes of a multiprocessor, besides registers.
struct Resources {
  const char* kernel;
  int columns;  // of its tile
  int threads;
  size_t shared_bytes;
};

// Kernels of one element type, similarity and objective, on the current device. Launches do not wait.
struct Kernels {
  void (*statistics)(const Statistics&, const Plan&, Stream);
  void (*gradient)(const Gradient&, const Plan&, Stream);
  void (*derivative)(const Derivative&, const Plan&, Stream);  // null: dL/dsim is dL/daccumulator
  void (*search)(const Search&, const Plan&, Stream);
  void (*gather)(const Gather&, Stream);
  void (*anchors)(const Anchors&, Stream);

  Plan (*plan)(int rows, int columns, int multiprocessors);
  int accumulators, statistics_planes, anchor_planes, row_operands, column_operands, element_bytes;
  bool factors, low_halves, needs_statistics, both_sides, keeps;
  const Resources* resources;  // of the kernels of scores
  int resources_count;
};

constexpr int kVectorThreads = 128;

void unit_of(const Unit&, Stream);
void parameter_gradient_of(const ParameterGradient&, Stream);

// Architectures: "sm_80", whose kernels run on later ones, too, and "sm_90a", where built: half precision on 9.0 alone.
// Elements: "bfloat16", "float16", "float32", and "tf32", float32 rounded as it is multiplied. Null: no kernel is so
// named.
const Kernels* find(const std::string& architecture, const std::string& element, const std::string& similarity,
                    const std::string& objective);

}  // namespace smartclip::cuda
