// From a problem to a launch of the Newton-price kernels.
#pragma once

#include "layer_launch.cuh"
#include "match_prices.cuh"

namespace dmm::cuda::prices {

// `allocate(bytes)` returns scratch that lives until the kernel has run.
template <int N, int K, bool kUnmatched>
struct WarpLaunch {
  using Shape = typename Warp<N, K, kUnmatched>::Shape;

  static void forward(const Problem& p, void* out, cudaStream_t stream) {
    launch(forward_kernel<N, K, kUnmatched>, p.B, kWarp, 0, 0, stream, p, out);
  }

  // False where the general kernel has to do it: with templates alone the largest one would need more registers than there are.
  template <typename Allocate>
  static bool backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
    if constexpr (kUnmatched && N * K > 40)
      return false;
    else
      launch_backward(p, out, stream, allocate);
    return true;
  }

  template <typename Allocate>
  static void launch_backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
    constexpr int64_t own_bytes = Grid<N, K, false>::kSharedFloats * int64_t{sizeof(float)};
    constexpr int64_t round_bytes = Shape::kWords * kWarp * int64_t{sizeof(typename Shape::Word)};
    const int64_t bytes = p.options.n_grad * p.options.n_proj * round_bytes;
    if (bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - own_bytes)
      return launch(backward_kernel<N, K, kUnmatched>, p.B, kWarp, own_bytes, bytes, stream, p, out, nullptr);
    constexpr int64_t kScratchLimit = int64_t{1} << 30;  // for all blocks together, as long as one block fits
    const int64_t resident = std::min(p.B, attribute(cudaDevAttrMultiProcessorCount) * 8);
    const int64_t blocks = std::clamp<int64_t>(kScratchLimit / bytes, 1, resident);
    launch(backward_kernel<N, K, kUnmatched>, blocks, kWarp, own_bytes, 0, stream, p, out, allocate(blocks * bytes));
  }
};

// Calls run(WarpLaunch<...>{}) for a problem that fits into registers.
template <int N, bool kUnmatched, typename Run>
void with_columns(const Problem& p, const Run& run) {
  if (p.M <= 64) return run(WarpLaunch<N, 2, kUnmatched>{});
  run(WarpLaunch<N, 4, kUnmatched>{});
}

template <bool kUnmatched, typename Run>
void with_rows(const Problem& p, const Run& run) {
  if (p.N <= 5) return with_columns<5, kUnmatched>(p, run);
  if (p.N <= 10) return with_columns<10, kUnmatched>(p, run);
  with_columns<16, kUnmatched>(p, run);
}

template <typename Run>
void with_layout(const Problem& p, const Run& run) {
  if (p.unmatched) return with_rows<true>(p, run);
  with_rows<false>(p, run);
}

struct MatchPrices {
  static GeneralSizes sizes_forward(const Problem& p) { return Sizes::forward(p.N, p.M); }
  static GeneralSizes sizes_backward(const Problem& p) { return Sizes::backward(p.N, p.M, p.options, p.unmatched); }
  template <typename T, bool kUnmatched>
  static constexpr auto* forward_kernel = general_forward_kernel<T, kUnmatched>;
  template <typename T, bool kUnmatched>
  static constexpr auto* backward_kernel = general_backward_kernel<T, kUnmatched>;

  static void registers_forward(const Problem& p, void* out, cudaStream_t stream) {
    with_layout(p, [&](auto layout) { decltype(layout)::forward(p, out, stream); });
  }
  template <typename Allocate>
  static bool registers_backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
    bool done = false;
    with_layout(p, [&](auto layout) { done = decltype(layout)::backward(p, out, stream, allocate); });
    return done;
  }
};

}  // namespace dmm::cuda::prices
