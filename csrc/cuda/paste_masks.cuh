// Pasted, thresholded and counted per cell on CUDA: a thread takes a few cells of one mask, one below the other, and writes
// each once, coalesced. Where the mask's box does not reach, that is all it does.
#pragma once

#include "../paste_geometry.h"
#include "launch.h"

#include <cstdint>

namespace dmm::grid {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kCells = 4;  // of a thread

// T is the element type of tensors, C the type of computations.
template <typename T, typename C>
struct PasteProblem {
  const T* masks;  // [M, S, S]
  const C* boxes;  // [M, 4]
  int64_t M;
  int S, rows, columns, samples;
};

template <typename C, typename T>
__device__ __forceinline__ C load(const T* at) {
  return static_cast<C>(__ldg(at));
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) paste_masks_kernel(const PasteProblem<T, C> p, T* __restrict__ cover) {
  const int c = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32);
  const int top = static_cast<int>((blockIdx.y * kWarps + threadIdx.x / 32) * kCells);
  const int64_t j = blockIdx.z;
  if (c >= p.columns) return;
  const C* box = p.boxes + 4 * j;
  const C samples = static_cast<C>(p.samples);
  const PasteAxis<C> x = paste_axis(box[0] * samples, box[2] * samples, p.S, static_cast<int64_t>(p.columns) * p.samples);
  const PasteAxis<C> y = paste_axis(box[1] * samples, box[3] * samples, p.S, static_cast<int64_t>(p.rows) * p.samples);
  const T* mask = p.masks + j * p.S * p.S;
  const bool reached = c * p.samples < x.end && (c + 1) * p.samples > x.begin;
  for (int r = top; r < top + kCells && r < p.rows; ++r) {
    int count = 0;
    if (reached && r * p.samples < y.end && (r + 1) * p.samples > y.begin) {
      for (int ky = 0; ky < p.samples; ++ky) {
        const Tap<C> ty = y.tap(r * p.samples + ky, p.S);
        const T* row0 = mask + ty.cell0 * p.S;
        const T* row1 = mask + ty.cell1 * p.S;
        for (int kx = 0; kx < p.samples; ++kx) {
          const Tap<C> tx = x.tap(c * p.samples + kx, p.S);
          const C value = ty.weight0 * (tx.weight0 * load<C>(row0 + tx.cell0) + tx.weight1 * load<C>(row0 + tx.cell1)) +
                          ty.weight1 * (tx.weight0 * load<C>(row1 + tx.cell0) + tx.weight1 * load<C>(row1 + tx.cell1));
          count += value > C(0.5);
        }
      }
    }
    cover[(j * p.rows + r) * p.columns + c] = static_cast<T>(static_cast<C>(count) / (samples * samples));
  }
}

// cover [M, rows, columns], none of them 0.
template <typename T, typename C>
void paste_masks(const char* op, const PasteProblem<T, C>& p, T* cover, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.columns, 32), ceil_div(p.rows, kWarps * kCells), static_cast<unsigned>(p.M));
  launch_kernel(op, paste_masks_kernel<T, C>, grid, kThreads, 0, stream, p, cover);
}

}  // namespace dmm::grid
