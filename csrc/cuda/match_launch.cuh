// From a problem to a launch of the kernels of Algorithm 1.
#pragma once

#include "layer_launch.cuh"
#include "match_registers.cuh"

namespace dmm::cuda {

template <int N, int kLanes, int K, bool kUnmatched>
struct Register {
  using Shape = Layout<N, kLanes, K, kUnmatched>;

  static constexpr int64_t kOwnBytes = kBackwardSharedFloats<N, kLanes, K, kUnmatched> * int64_t{sizeof(float)};

  static int64_t groups(const Problem& p) { return ceil_div(p.B, Shape::kProblems); }

  static void forward(const Problem& p, void* out, cudaStream_t stream) {
    launch(register_forward_kernel<N, kLanes, K, kUnmatched>, groups(p), kWarp, 0, 0, stream, p, out);
  }

  static int64_t step_bytes(const Problem& p) {  // masks of an outer step
    return p.options.n_proj * Shape::kWords * kWarp * int64_t{sizeof(typename Shape::Word)};
  }
  static int64_t shared_bytes_for_masks() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kOwnBytes; }
  static bool masks_fit(const Problem& p) { return step_bytes(p) <= shared_bytes_for_masks(); }

  // `allocate(bytes)` returns scratch that lives until the kernel has run.
  template <typename Allocate>
  static void backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
    const int64_t step_bytes = Register::step_bytes(p), available = shared_bytes_for_masks();
    int64_t steps = p.options.n_grad, blocks = groups(p);
    Segments segments{static_cast<int>(steps), 1, nullptr};
    if (steps * step_bytes > available) {
      // Four blocks on a multiprocessor of the largest kind, one per scheduler; a longer step takes what there is.
      steps = std::max<int64_t>(1, std::min<int64_t>(available, 48 << 10) / step_bytes);
      const int64_t count = ceil_div(p.options.n_grad, steps);
      const int64_t per_processor = std::clamp<int64_t>(
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / (steps * step_bytes + kOwnBytes + 1024), 1, 16);
      blocks = std::min(blocks, attribute(cudaDevAttrMultiProcessorCount) * per_processor);
      const int64_t floats = blocks * ((count - 1) * Shape::kSnapshot + Shape::kPending) * kWarp;
      segments = {static_cast<int>(steps), static_cast<int>(count),
                  static_cast<float*>(allocate(floats * int64_t{sizeof(float)}))};
    }
    launch(register_backward_kernel<N, kLanes, K, kUnmatched>, blocks, kWarp, kOwnBytes, steps * step_bytes, stream, p, out,
           segments, groups(p));
  }
};

// Calls run(Register<...>{}) with the layout for a problem that fits into registers. A whole warp per problem is
// quickest for one problem; once there are more problems than schedulers can keep hidden behind each other, fewer lanes
// with more columns each waste less on reductions and padding. The backward keeps its masks in shared memory, which
// sixteen lanes fill best.
template <int N, bool kBackward, bool kUnmatched, typename Run>
void with_columns(const Problem& p, bool crowded, const Run& run) {
  if constexpr (N <= 5 && !kBackward) {
    if (crowded && p.M <= 56) return run(Register<N, 8, 7, kUnmatched>{});
    if (crowded && p.M > 64 && p.M <= 112) return run(Register<N, 16, 7, kUnmatched>{});
  }
  if constexpr (N <= 10) {
    if (crowded && p.M <= 64) return run(Register<N, 16, 4, kUnmatched>{});
  }
  if (p.M <= 64) return run(Register<N, 32, 2, kUnmatched>{});
  run(Register<N, 32, 4, kUnmatched>{});
}

template <bool kBackward, bool kUnmatched, typename Run>
void with_layout(const Problem& p, const Run& run) {
  const bool crowded = p.B > 8 * attribute(cudaDevAttrMultiProcessorCount);
  if (p.N <= 1) return with_columns<1, kBackward, kUnmatched>(p, crowded, run);
  if (p.N <= 3) return with_columns<3, kBackward, kUnmatched>(p, crowded, run);
  if (p.N <= 5) return with_columns<5, kBackward, kUnmatched>(p, crowded, run);
  if (p.N <= 10) return with_columns<10, kBackward, kUnmatched>(p, crowded, run);
  with_columns<16, kBackward, kUnmatched>(p, crowded, run);
}

template <bool kBackward, typename Run>
void with_layout(const Problem& p, const Run& run) {
  if (p.unmatched) return with_layout<kBackward, true>(p, run);
  with_layout<kBackward, false>(p, run);
}

struct Match {
  static GeneralSizes sizes_forward(const Problem& p) { return GeneralSizes::forward(p.N, p.M); }
  static GeneralSizes sizes_backward(const Problem& p) { return GeneralSizes::backward(p.N, p.M, p.options, p.unmatched); }
  template <typename T, bool kUnmatched>
  static constexpr auto* forward_kernel = general_forward_kernel<T, kUnmatched>;
  template <typename T, bool kUnmatched>
  static constexpr auto* backward_kernel = general_backward_kernel<T, kUnmatched>;

  static void registers_forward(const Problem& p, void* out, cudaStream_t stream) {
    with_layout<false>(p, [&](auto layout) { decltype(layout)::forward(p, out, stream); });
  }
  template <typename Allocate>
  static bool registers_backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
    bool fits = false;
    with_layout<true>(p, [&](auto layout) {
      if ((fits = decltype(layout)::masks_fit(p))) decltype(layout)::backward(p, out, stream, allocate);
    });
    return fits;
  }
};

}  // namespace dmm::cuda
