// Eq. 8 on CUDA, forward and backward. No atomics: the same bits on every run.
//
// Forward: a block takes a tile of the image for a group of templates. It lists the proposals that reach the tile and
// that a template of the group uses, in order, and evaluates each once per pixel for the whole group: so the work
// follows the boxes' areas, and every output is written once, coalesced.
//
// Backward: a block takes one row of cells of one mask. Along y it gathers what the image rows near these cells
// received, v_i[x] = sum_y wy[y] dOut_i[y, x]; along x that is either contracted with the stretched mask (its part of
// dX_i) or, weighted by X_i and summed over i, with the tents of the cells (dMask). A second, tiny kernel adds up the
// parts of dX.
#pragma once

#include "../paste_geometry.h"
#include "launch.h"
#include "sum_warp.h"

#include <cstdint>

namespace dmm::paste {

alignas(16) extern __shared__ unsigned char shared_memory[];

constexpr int kThreads = 128, kWarps = kThreads / 32;

// T is the element type of tensors, C the type of computations.
template <typename T, typename C>
struct Problem {
  const T* assignment;  // [N, M]
  const T* masks;       // [M, S, S]
  const C* boxes;       // [M, 4]
  int64_t N, M;
  int S, H, W;

  __device__ PasteAxis<C> x_axis(int64_t j) const { return paste_axis(boxes[4 * j], boxes[4 * j + 2], S, W); }
  __device__ PasteAxis<C> y_axis(int64_t j) const { return paste_axis(boxes[4 * j + 1], boxes[4 * j + 3], S, H); }
  __device__ const T* mask(int64_t j) const { return masks + j * S * S; }
};

template <typename C, typename T>
__device__ __forceinline__ C load(const T* at) {
  return static_cast<C>(__ldg(at));
}

// ---- forward ----

// 128 bytes of sums in registers per thread.
template <typename C, int kGroup>
__host__ __device__ constexpr int rows_per_thread() {
  return 128 / (kGroup * static_cast<int>(sizeof(C)));
}

template <typename C, int kGroup>
struct Used {  // a proposal that the tile needs
  PasteAxis<C> x, y;
  int64_t j;
  C weight[kGroup];
};

template <typename T, typename C, int kGroup>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Problem<T, C> p, T* __restrict__ out) {
  constexpr int kRows = rows_per_thread<C, kGroup>();  // image rows per thread
  __shared__ Used<C, kGroup> used[kThreads];
  __shared__ int used_by_warp[kWarps];

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int left = blockIdx.x * 32, top = blockIdx.y * (kWarps * kRows);
  const int right = min(left + 32, p.W), bottom = min(top + kWarps * kRows, p.H);
  const int64_t first_template = static_cast<int64_t>(blockIdx.z) * kGroup;
  const int templates = static_cast<int>(min(p.N - first_template, static_cast<int64_t>(kGroup)));
  const int x = left + lane, y = top + warp * kRows;
  C sum[kRows][kGroup] = {};

  for (int64_t first = 0; first < p.M; first += kThreads) {
    Used<C, kGroup> mine;
    mine.j = first + threadIdx.x;
    bool wanted = false;
    if (mine.j < p.M) {
      mine.x = p.x_axis(mine.j);
      mine.y = p.y_axis(mine.j);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        mine.weight[i] = i < templates ? load<C>(p.assignment + (first_template + i) * p.M + mine.j) : C(0);
        wanted |= mine.weight[i] != C(0);
      }
      wanted &= mine.x.begin < right && mine.x.end > left && mine.y.begin < bottom && mine.y.end > top;
    }
    const unsigned votes = __ballot_sync(0xffffffffu, wanted);
    if (lane == 0) used_by_warp[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), count = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += used_by_warp[w];
      count += used_by_warp[w];
    }
    if (wanted) used[before] = mine;
    __syncthreads();

    for (int k = 0; k < count; ++k) {
      const Used<C, kGroup>& proposal = used[k];
      if (x < proposal.x.begin || x >= proposal.x.end) continue;  // weights of 0, but a cell may be infinite
      const Tap<C> tx = proposal.x.tap(x, p.S);
      const T* mask = p.mask(proposal.j);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (y + r < proposal.y.begin || y + r >= proposal.y.end) continue;
        const Tap<C> ty = proposal.y.tap(y + r, p.S);
        const T* row0 = mask + ty.cell0 * p.S;
        const T* row1 = mask + ty.cell1 * p.S;
        const C value = ty.weight0 * (tx.weight0 * load<C>(row0 + tx.cell0) + tx.weight1 * load<C>(row0 + tx.cell1)) +
                        ty.weight1 * (tx.weight0 * load<C>(row1 + tx.cell0) + tx.weight1 * load<C>(row1 + tx.cell1));
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum[r][i] += proposal.weight[i] * value;
      }
    }
    __syncthreads();
  }

  if (x >= p.W) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (i < templates && y + r < p.H) out[((first_template + i) * p.H + y + r) * p.W + x] = static_cast<T>(sum[r][i]);
}

// ---- backward ----

constexpr int kGradGroup = 8;  // templates whose gradients a thread gathers at once

// The pixels that see cell `s` of an axis, those with |u - s| < 1, or one more on either side.
template <typename C>
__device__ __forceinline__ void pixels_of_cell(const PasteAxis<C>& axis, int s, int& begin, int& end) {
  const C origin = axis.low - C(0.5);
  begin = max(axis.begin, clamp_to_image(std::floor(origin + (static_cast<C>(s) - C(0.5)) / axis.scale), axis.end));
  end = min(axis.end, clamp_to_image(std::ceil(origin + (static_cast<C>(s) + C(1.5)) / axis.scale) + C(1), axis.end));
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Problem<T, C> p, const T* __restrict__ grad, C* __restrict__ parts, T* __restrict__ grad_masks) {
  C* cells = reinterpret_cast<C*>(shared_memory);  // [S]: this block's row of dMask; cell t belongs to thread t % kThreads
  __shared__ C combined[kThreads];                 // sum_i X_i v_i[x] for the pixels of one step
  __shared__ C warp_parts[kWarps][kGradGroup];

  const int64_t j = blockIdx.x / p.S;
  const int s = blockIdx.x % p.S;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PasteAxis<C> ax = p.x_axis(j), ay = p.y_axis(j);
  const int64_t plane = static_cast<int64_t>(p.H) * p.W;
  const T* mask_row = p.mask(j) + static_cast<int64_t>(s) * p.S;
  int top = 0, bottom = 0;
  if (!ax.empty() && !ay.empty()) pixels_of_cell(ay, s, top, bottom);
  for (int t = threadIdx.x; t < p.S; t += kThreads) cells[t] = C(0);

  for (int64_t first = 0; first < p.N; first += kGradGroup) {
    const int templates = static_cast<int>(min(p.N - first, static_cast<int64_t>(kGradGroup)));
    const T* weights = p.assignment + first * p.M + j;  // of these templates, M apart
    bool used = false;
    for (int i = 0; i < templates; ++i) used |= load<C>(weights + i * p.M) != C(0);
    C part[kGradGroup] = {};
    for (int step = ax.begin; top < bottom && step < ax.end; step += kThreads) {
      const int x = step + threadIdx.x;
      C gathered[kGradGroup] = {};
      if (x < ax.end) {
        const T* pixel = grad + (first * p.H + top) * p.W + x;
        for (int y = top; y < bottom; ++y, pixel += p.W) {
          const C wy = ay.tent(y, s);
#pragma unroll
          for (int i = 0; i < kGradGroup; ++i)
            if (i < templates) gathered[i] += wy * load<C>(pixel + i * plane);
        }
        const Tap<C> tap = ax.tap(x, p.S);
        const C stretched = tap.weight0 * load<C>(mask_row + tap.cell0) + tap.weight1 * load<C>(mask_row + tap.cell1);
#pragma unroll
        for (int i = 0; i < kGradGroup; ++i) part[i] += gathered[i] * stretched;
      }
      if (!used) continue;  // the whole block agrees
      C sum = C(0);
#pragma unroll
      for (int i = 0; i < kGradGroup; ++i)
        if (i < templates) sum += load<C>(weights + i * p.M) * gathered[i];
      combined[threadIdx.x] = sum;
      __syncthreads();
      for (int t = threadIdx.x; t < p.S; t += kThreads) {
        int begin, end;
        pixels_of_cell(ax, t, begin, end);
        C cell = cells[t];
        for (int at = max(begin, step); at < min(end, step + kThreads); ++at) cell += ax.tent(at, t) * combined[at - step];
        cells[t] = cell;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kGradGroup; ++i) {
      const C sum = sum_warp(part[i]);
      if (lane == 0) warp_parts[warp][i] = sum;
    }
    __syncthreads();
    if (threadIdx.x < templates) {
      C sum = C(0);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += warp_parts[w][threadIdx.x];
      parts[blockIdx.x * p.N + first + threadIdx.x] = sum;
    }
    __syncthreads();
  }
  for (int t = threadIdx.x; t < p.S; t += kThreads)
    grad_masks[static_cast<int64_t>(blockIdx.x) * p.S + t] = static_cast<T>(cells[t]);
}

// grad_assignment[i, j] = sum_s parts[j, s, i]
template <typename T, typename C>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const C* __restrict__ parts, T* __restrict__ grad_assignment, int64_t N, int64_t M, int S) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // of [M, N]
  if (index >= N * M) return;
  const int64_t j = index / N, i = index % N;
  C sum = C(0);
#pragma unroll 4
  for (int s = 0; s < S; ++s) sum += parts[(j * S + s) * N + i];
  grad_assignment[i * M + j] = static_cast<T>(sum);
}

// ---- launches ----

template <typename T, typename C, int kGroup>
void launch_forward(const char* op, const Problem<T, C>& p, T* out, cudaStream_t stream) {
  constexpr int kTileRows = kWarps * rows_per_thread<C, kGroup>();
  const dim3 grid(ceil_div(p.W, 32), ceil_div(p.H, kTileRows), ceil_div(p.N, kGroup));
  launch_kernel(op, forward_kernel<T, C, kGroup>, grid, kThreads, 0, stream, p, out);
}

// out [N, H, W], none of them 0.
template <typename T, typename C>
void forward(const char* op, const Problem<T, C>& p, T* out, cudaStream_t stream) {
  if (p.N <= 4) return launch_forward<T, C, 4>(op, p, out, stream);
  if (p.N <= 8) return launch_forward<T, C, 8>(op, p, out, stream);
  launch_forward<T, C, 16>(op, p, out, stream);
}

// grad [N, H, W]; grad_assignment [N, M]; grad_masks [M, S, S]; parts [M, S, N] is scratch.
template <typename T, typename C>
void backward(const char* op, const Problem<T, C>& p, const T* grad, C* parts, T* grad_assignment, T* grad_masks,
              cudaStream_t stream) {
  if (p.M * p.S > 0)
    launch_kernel(op, backward_kernel<T, C>, dim3(static_cast<unsigned>(p.M * p.S)), kThreads, p.S * sizeof(C), stream, p, grad,
                  parts, grad_masks);
  if (p.N * p.M > 0)
    launch_kernel(op, add_parts_kernel<T, C>, dim3(static_cast<unsigned>(ceil_div(p.N * p.M, kThreads))), kThreads, 0, stream,
                  parts, grad_assignment, p.N, p.M, p.S);
}

}  // namespace dmm::paste
