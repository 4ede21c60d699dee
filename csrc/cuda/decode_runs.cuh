// Run-length codes to cells on CUDA: a thread takes one cell. In each column of pixels that the cell has a part of, it looks
// for the place where the mask changes next and walks on from there while places are in the cell. Whole numbers, no atomics.
#pragma once

#include "../cell_geometry.h"
#include "launch.h"

#include <cstdint>

namespace dmm::grid {

constexpr int kRunThreads = 128, kRunRows = kRunThreads / 32;  // a warp takes 32 cells of a row

struct RunsProblem {
  const int32_t* runs;  // [M, R]
  int64_t M;
  int R;
  CellAxis y, x;
};

// The first of the places k..R that lies beyond `position`, or R. Steps double until they are beyond it, then halve.
__device__ __forceinline__ int next_place(const int32_t* runs, int k, int R, int position) {
  int step = 1, low = k;  // places before `low` are not beyond it
  while (low < R && __ldg(runs + low) <= position) {
    k = low + 1;
    low = R - low > step ? low + step : R;
    step = step < (1 << 29) ? 2 * step : step;
  }
  int high = low;
  while (k < high) {
    const int middle = k + (high - k) / 2;
    if (__ldg(runs + middle) <= position)
      k = middle + 1;
    else
      high = middle;
  }
  return k;
}

__global__ void __launch_bounds__(kRunThreads)
    decode_runs_kernel(const RunsProblem p, double per_unit, float* __restrict__ share) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int64_t r = static_cast<int64_t>(blockIdx.y) * kRunRows + threadIdx.x / 32;
  if (c >= p.x.cells || r >= p.y.cells) return;
  const int32_t* runs = p.runs + blockIdx.z * static_cast<int64_t>(p.R);
  // Positions and units are below 2^31.
  const int height = static_cast<int>(p.y.pixels), top = static_cast<int>(p.y.first_pixel(r));
  const int bottom = static_cast<int>(p.y.end_pixel(r)), end = static_cast<int>(p.x.end_pixel(c));
  int units = 0, k = 0;
  for (int x = static_cast<int>(p.x.first_pixel(c)); x < end; ++x) {
    const int column = x * height;
    k = next_place(runs, k, p.R, column + top);
    int inside = 0, from = top;
    for (int next = k;; ++next) {
      const int at = next < p.R ? __ldg(runs + next) : INT32_MAX;
      // Without a sign, as a place that is none may be any number.
      int place = at < column + bottom ? static_cast<int>(static_cast<unsigned>(at) - column) : bottom;
      place = place > from ? place : from;
      if (next % 2 == 1) inside += static_cast<int>(p.y.shared(from, place, r));
      if (next >= p.R || place == bottom) break;
      from = place;
    }
    units += inside * static_cast<int>(p.x.shared(x, x + 1, c));
  }
  share[(blockIdx.z * p.y.cells + r) * p.x.cells + c] = static_cast<float>(static_cast<double>(units) * per_unit);
}

// share [M, rows, columns], none of them 0.
inline void decode_runs(const char* op, const RunsProblem& p, float* share, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.x.cells, 32)), static_cast<unsigned>(ceil_div(p.y.cells, kRunRows)),
                  static_cast<unsigned>(p.M));
  const double per_unit = 1.0 / static_cast<double>(p.y.pixels * p.x.pixels);  // not in the kernel: a division takes registers
  launch_kernel(op, decode_runs_kernel, grid, kRunThreads, 0, stream, p, per_unit, share);
}

}  // namespace dmm::grid
