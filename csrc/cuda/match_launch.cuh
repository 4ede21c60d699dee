// From a problem to a launch: which kernel, how many lanes, how much scratch. Pointers, sizes and a stream; no torch.
#pragma once

#include "launch.h"
#include "match_general.cuh"
#include "match_registers.cuh"

#include <algorithm>

namespace dmm::cuda {

inline int64_t attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda("dmm: matching layer", cudaGetDevice(&device));
  check_cuda("dmm: matching layer", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// `own_bytes` is the kernel's static shared memory, `shared_bytes` comes on top.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, int64_t own_bytes, int64_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (own_bytes + shared_bytes > kWithoutAsking)
    check_cuda("dmm: matching layer", cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                  static_cast<int>(shared_bytes)));
  launch_kernel("dmm: matching layer", kernel, dim3(static_cast<unsigned>(blocks)), static_cast<int>(threads), shared_bytes,
                stream, arguments...);
}

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

template <int N, int kLanes, int K>
struct Register {
  using Shape = Layout<N, kLanes, K>;

  static int64_t groups(const Problem& p) { return ceil_div(p.B, Shape::kProblems); }

  static void forward(const Problem& p, void* out, cudaStream_t stream) {
    launch(register_forward_kernel<N, kLanes, K>, groups(p), kWarp, 0, 0, stream, p, out);
  }

  static int64_t step_bytes(const Problem& p) {  // masks of an outer step
    return p.options.n_proj * Shape::kWords * kWarp * int64_t{sizeof(typename Shape::Word)};
  }
  static int64_t shared_bytes_for_masks() {
    return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) -
           kBackwardSharedFloats<N, kLanes, K> * int64_t{sizeof(float)};
  }
  static bool masks_fit(const Problem& p) { return step_bytes(p) <= shared_bytes_for_masks(); }

  // `allocate(bytes)` returns scratch that lives until the kernel has run.
  template <typename Allocate>
  static void backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
    const int64_t own_bytes = kBackwardSharedFloats<N, kLanes, K> * int64_t{sizeof(float)};
    const int64_t step_bytes = Register::step_bytes(p), available = shared_bytes_for_masks();
    int64_t steps = p.options.n_grad, blocks = groups(p);
    Segments segments{static_cast<int>(steps), 1, nullptr};
    if (steps * step_bytes > available) {
      // Four blocks on a multiprocessor of the largest kind, one per scheduler; a longer step takes what there is.
      steps = std::max<int64_t>(1, std::min<int64_t>(available, 48 << 10) / step_bytes);
      const int64_t count = ceil_div(p.options.n_grad, steps);
      const int64_t per_processor = std::clamp<int64_t>(
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (steps * step_bytes + own_bytes + 1024), 1, 16);
      blocks = std::min(blocks, attribute(cudaDevAttrMultiProcessorCount) * per_processor);
      const int64_t floats = blocks * ((count - 1) * Shape::kSnapshot + Shape::kPending) * kWarp;
      segments = {static_cast<int>(steps), static_cast<int>(count),
                  static_cast<float*>(allocate(floats * int64_t{sizeof(float)}))};
    }
    launch(register_backward_kernel<N, kLanes, K>, blocks, kWarp, own_bytes, steps * step_bytes, stream, p, out,
           segments, groups(p));
  }
};

// Calls run(Register<...>{}) with the layout for a problem that fits into registers. A whole warp per problem is
// quickest for one problem; once there are more problems than schedulers can keep hidden behind each other, fewer lanes
// with more columns each waste less on reductions and padding. The backward keeps its masks in shared memory, which
// sixteen lanes fill best.
template <int N, bool kBackward, typename Run>
void with_columns(const Problem& p, bool crowded, const Run& run) {
  if constexpr (N <= 5 && !kBackward) {
    if (crowded && p.M <= 56) return run(Register<N, 8, 7>{});
    if (crowded && p.M > 64 && p.M <= 112) return run(Register<N, 16, 7>{});
  }
  if constexpr (N <= 10) {
    if (crowded && p.M <= 64) return run(Register<N, 16, 4>{});
  }
  if (p.M <= 64) return run(Register<N, 32, 2>{});
  run(Register<N, 32, 4>{});
}

template <bool kBackward, typename Run>
void with_layout(const Problem& p, const Run& run) {
  const bool crowded = p.B > 8 * attribute(cudaDevAttrMultiProcessorCount);
  if (p.N <= 1) return with_columns<1, kBackward>(p, crowded, run);
  if (p.N <= 3) return with_columns<3, kBackward>(p, crowded, run);
  if (p.N <= 5) return with_columns<5, kBackward>(p, crowded, run);
  if (p.N <= 10) return with_columns<10, kBackward>(p, crowded, run);
  with_columns<16, kBackward>(p, crowded, run);
}

inline bool fits_registers(const Problem& p) {
  constexpr int64_t kMaxTemplates = 16, kMaxProposals = 128, kMaxRounds = (int64_t{1} << 31) - 1;
  return p.element != Element::f64 && p.N <= kMaxTemplates && p.M <= kMaxProposals && p.B <= kMaxBlocks &&
         p.options.n_grad <= kMaxRounds && p.options.n_proj <= kMaxRounds / p.options.n_grad;
}

// One block per problem: its threads, and where its arrays go.
template <typename T>
struct GeneralPlan {
  int64_t blocks, threads, shared_bytes, scratch_bytes, cold_bytes;

  GeneralPlan(const Problem& p, const GeneralSizes& sizes) {
    constexpr int64_t kScratchLimit = int64_t{1} << 30;  // for all blocks together, as long as one block fits
    const int64_t array_bytes = sizes.array_bytes<T>();
    threads = std::clamp<int64_t>(std::max(32 * p.N, (p.M + 31) / 32 * 32), 64, kGeneralThreads<T>);
    shared_bytes = array_bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024 ? array_bytes : 0;
    const int64_t per_block = (shared_bytes ? 0 : array_bytes) + sizes.cold_bytes<T>();
    blocks = std::min(p.B, attribute(cudaDevAttrMultiProcessorCount) * (2048 / threads));
    if (per_block) blocks = std::clamp<int64_t>(kScratchLimit / per_block, 1, blocks);
    scratch_bytes = shared_bytes ? 0 : blocks * array_bytes;
    cold_bytes = blocks * sizes.cold_bytes<T>();
  }
};

template <typename T, typename Allocate>
void forward_general(const Problem& p, void* out, cudaStream_t stream, const Allocate& allocate) {
  const GeneralSizes sizes = GeneralSizes::forward(p.N, p.M);
  const GeneralPlan<T> plan(p, sizes);
  auto* scratch = static_cast<unsigned char*>(plan.scratch_bytes ? allocate(plan.scratch_bytes) : nullptr);
  launch(general_forward_kernel<T>, plan.blocks, plan.threads, 0, plan.shared_bytes, stream, p, sizes, scratch, out);
}

template <typename T, typename Allocate>
void backward_general(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
  const GeneralSizes sizes = GeneralSizes::backward(p.N, p.M, p.options);
  const GeneralPlan<T> plan(p, sizes);
  auto* cold = static_cast<unsigned char*>(allocate(plan.cold_bytes + plan.scratch_bytes));
  auto* scratch = plan.scratch_bytes ? cold + plan.cold_bytes : nullptr;
  launch(general_backward_kernel<T>, plan.blocks, plan.threads, 0, plan.shared_bytes, stream, p, sizes, cold, scratch,
         out);
}

// The two entries. The problem is not empty; every tensor is contiguous and on the current device.
template <typename Allocate>
void forward(const Problem& p, void* out, cudaStream_t stream, const Allocate& allocate) {
  if (fits_registers(p))
    with_layout<false>(p, [&](auto layout) { decltype(layout)::forward(p, out, stream); });
  else if (p.element == Element::f64)
    forward_general<double>(p, out, stream, allocate);
  else
    forward_general<float>(p, out, stream, allocate);
}

template <typename Allocate>
void backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
  bool done = false;
  if (fits_registers(p))
    with_layout<true>(p, [&](auto layout) {
      if ((done = decltype(layout)::masks_fit(p))) decltype(layout)::backward(p, out, stream, allocate);
    });
  if (done) return;
  if (p.element == Element::f64)
    backward_general<double>(p, out, stream, allocate);
  else
    backward_general<float>(p, out, stream, allocate);
}

}  // namespace dmm::cuda
