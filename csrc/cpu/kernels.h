// The launches of the CPU backend: one pass over a tile of accumulated products while it is in cache. The products
// themselves are torch's.
#pragma once

#include <string>

#include "../problem.h"

namespace smartclip {

template <class T>
struct Tile {
  int64_t row = 0, rows = 0, column = 0, columns = 0;  // first and number of
  const T* accumulator[2] = {};                        // one matrix for each of the similarity's accumulators
  int64_t accumulator_stride = 0;
  T* out[2] = {};  // may be the accumulators themselves
  int64_t out_stride = 0;
};

// How the losses of a batch become one number.
template <class T>
struct Reduction {
  double share[2] = {};  // of the rows' and of the columns' losses in it
  bool mean = false;     // over a side's anchors; else the sum
  bool counted = false;  // anchors are those with a positive; else all
  T* loss = nullptr;     // null: they stay as they are
  T* weight = nullptr;   // for each side that has losses, what one counts in it
};

// Best candidates of every row so far, best first; (rows, k) each.
template <class T>
struct Best {
  T* value = nullptr;
  int64_t* index = nullptr;
  int64_t k = 0;
};

// Kernels of one similarity and objective. Tiles come row panel by row panel, from the left to the right: the first
// tile of a row or column starts its statistics, so nothing has to be cleared.
template <class T>
struct Kernels {
  // accumulators -> statistics of rows and columns
  void (*statistics)(const Problem<T>&, const Tile<T>&, int threads);
  // statistics -> loss, on each side that has anchors, and their reduction
  void (*loss)(const Problem<T>&, const Reduction<T>&);
  // statistics and weights -> anchor
  void (*anchor)(const Problem<T>&);
  // accumulators -> dL/daccumulator; with `statistics`, those of the rows in the same sweep
  void (*gradient)(const Problem<T>&, const Tile<T>&, bool statistics, int threads);
  // accumulators -> sim
  void (*similarity)(const Problem<T>&, const Tile<T>&, int threads);
  // accumulators, dL/dsim (columns wide, dense) -> dL/daccumulator
  void (*derivative)(const Problem<T>&, const Tile<T>&, const T* grad_sim, int threads);
  // Retrieval. Rows are anchors, columns candidates; `swapped` where rows are texts.
  void (*topk)(const Problem<T>&, const Tile<T>&, bool swapped, const Best<T>&, int threads);
  void (*best_positive)(const Problem<T>&, const Tile<T>&, bool swapped, const Best<T>&, int threads);
  void (*rank)(const Problem<T>&, const Tile<T>&, bool swapped, const Best<T>&, int64_t* ranks, int threads);

  int accumulators, statistics_planes, anchor_planes;
  bool factors, needs_statistics, both_sides;
};

// Null where no kernel has that name.
template <class T>
using Find = const Kernels<T>* (*)(const std::string& similarity, const std::string& objective);

struct Isa {
  const char* name;
  bool (*runs_here)();
  Find<float> find_float;
  Find<double> find_double;
};

// Those built, the fastest first; the last runs everywhere.
extern const Isa kIsas[];
extern const int kIsaCount;

}  // namespace smartclip
