// How the matching layers are launched: which kernel for which problem, its threads, its scratch. Pointers, sizes and a stream;
// no torch. A layer is a struct with what is its own:
//   sizes_forward(p), sizes_backward(p)       GeneralSizes of a block of its general kernels
//   forward_kernel<T, kUnmatched>, backward_kernel<T, kUnmatched>    those kernels, for any size and for float64
//   registers_forward(p, out, stream)                        its kernels for problems that fit into registers
//   registers_backward(p, out, stream, allocate) -> bool     the same; false where the problem needs too much shared memory
#pragma once

#include "launch.h"
#include "match_general.cuh"

#include <algorithm>
#include <mutex>

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
  // The limit is the kernel's, not the launch's: another thread must not lower it in between.
  static std::mutex limits;
  std::unique_lock<std::mutex> alone(limits, std::defer_lock);
  if (own_bytes + shared_bytes > kWithoutAsking) {
    alone.lock();
    check_cuda("dmm: matching layer",
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  launch_kernel("dmm: matching layer", kernel, dim3(static_cast<unsigned>(blocks)), static_cast<int>(threads), shared_bytes,
                stream, arguments...);
}

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

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

// `allocate(bytes)` returns scratch that lives until the kernel has run.
template <typename Layer, typename T, typename Allocate>
void general_forward(const Problem& p, void* out, cudaStream_t stream, const Allocate& allocate) {
  const GeneralSizes sizes = Layer::sizes_forward(p);
  const GeneralPlan<T> plan(p, sizes);
  auto* scratch = static_cast<unsigned char*>(plan.scratch_bytes ? allocate(plan.scratch_bytes) : nullptr);
  const auto kernel = p.unmatched ? Layer::template forward_kernel<T, true> : Layer::template forward_kernel<T, false>;
  launch(kernel, plan.blocks, plan.threads, 0, plan.shared_bytes, stream, p, sizes, scratch, out);
}

template <typename Layer, typename T, typename Allocate>
void general_backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
  const GeneralSizes sizes = Layer::sizes_backward(p);
  const GeneralPlan<T> plan(p, sizes);
  auto* cold = static_cast<unsigned char*>(allocate(plan.cold_bytes + plan.scratch_bytes));
  auto* scratch = plan.scratch_bytes ? cold + plan.cold_bytes : nullptr;
  const auto kernel = p.unmatched ? Layer::template backward_kernel<T, true> : Layer::template backward_kernel<T, false>;
  launch(kernel, plan.blocks, plan.threads, 0, plan.shared_bytes, stream, p, sizes, cold, scratch, out);
}

// The two entries. The problem is not empty; every tensor is contiguous and on the current device.
template <typename Layer, typename Allocate>
void forward(const Problem& p, void* out, cudaStream_t stream, const Allocate& allocate) {
  if (fits_registers(p)) return Layer::registers_forward(p, out, stream);
  if (p.element == Element::f64) return general_forward<Layer, double>(p, out, stream, allocate);
  general_forward<Layer, float>(p, out, stream, allocate);
}

template <typename Layer, typename Allocate>
void backward(const Problem& p, const Gradients& out, cudaStream_t stream, const Allocate& allocate) {
  if (fits_registers(p) && Layer::registers_backward(p, out, stream, allocate)) return;
  if (p.element == Element::f64) return general_backward<Layer, double>(p, out, stream, allocate);
  general_backward<Layer, float>(p, out, stream, allocate);
}

}  // namespace dmm::cuda
