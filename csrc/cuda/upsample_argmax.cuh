// Labels from small logits on CUDA: a thread takes a few pixels of one column and, at each, looks at all logits.
#pragma once

#include "../cell_geometry.h"
#include "launch.h"

#include <cstdint>

namespace dmm::grid {

constexpr int kLabelThreads = 128, kLabelWarps = kLabelThreads / 32;
constexpr int kLabelRows = 4;  // of a thread

// T is the element type of tensors, C the type of computations.
template <typename T, typename C>
struct LabelProblem {
  const T* logits;      // [N, h, w]
  const int64_t* rank;  // [N]
  int N, h, w, H, W;
};

template <typename T, typename C>
__global__ void __launch_bounds__(kLabelThreads)
    upsample_argmax_kernel(const LabelProblem<T, C> p, uint8_t* __restrict__ labels) {
  const int x = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32);
  const int top = static_cast<int>((blockIdx.y * kLabelWarps + threadIdx.x / 32) * kLabelRows);
  if (x >= p.W) return;
  const Between<C> tx = between<C>(x, p.w, p.W);
  const int64_t plane = static_cast<int64_t>(p.h) * p.w;
  for (int y = top; y < top + kLabelRows && y < p.H; ++y) {
    const Between<C> ty = between<C>(y, p.h, p.H);
    const T* row0 = p.logits + static_cast<int64_t>(ty.first) * p.w;
    const T* row1 = p.logits + static_cast<int64_t>(ty.second) * p.w;
    C highest = C(0);
    int64_t rank = 0;
    int label = 0;
    for (int n = 0; n < p.N; ++n, row0 += plane, row1 += plane) {
      const C left =
          (C(1) - ty.weight) * static_cast<C>(__ldg(row0 + tx.first)) + ty.weight * static_cast<C>(__ldg(row1 + tx.first));
      const C right =
          (C(1) - ty.weight) * static_cast<C>(__ldg(row0 + tx.second)) + ty.weight * static_cast<C>(__ldg(row1 + tx.second));
      const C value = (C(1) - tx.weight) * left + tx.weight * right;
      if (value > highest || (value == highest && label > 0 && __ldg(p.rank + n) > rank)) {
        highest = value;
        rank = __ldg(p.rank + n);
        label = n + 1;
      }
    }
    labels[static_cast<int64_t>(y) * p.W + x] = static_cast<uint8_t>(label);
  }
}

// labels [H, W], none of them 0.
template <typename T, typename C>
void upsample_argmax(const char* op, const LabelProblem<T, C>& p, uint8_t* labels, cudaStream_t stream) {
  const dim3 grid(ceil_div(p.W, 32), ceil_div(p.H, kLabelWarps * kLabelRows));
  launch_kernel(op, upsample_argmax_kernel<T, C>, grid, kLabelThreads, 0, stream, p, labels);
}

}  // namespace dmm::grid
