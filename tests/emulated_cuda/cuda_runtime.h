// Just enough CUDA on the host to run this project's kernels without a GPU: every thread of a block is a fiber, blocks
// run one after the other, and what threads exchange passes through barriers. Slow, exact, for tests alone.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local  // one thread runs all fibers: static, and may be extern

using std::max, std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 20;

struct Barrier {
  unsigned size = 0, arrived = 0, generation = 0;
};

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<char> done;
  ucontext_t scheduler;
  unsigned current = 0;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> slots;  // what a thread holds out to its warp
  unsigned any = 0;
  unsigned steps = 0;  // arrivals at barriers and ends of threads
  std::function<void()> body;
};

inline Block block;
inline struct Device {
  int processors = 3, shared_bytes = 99 << 10;  // a small device: blocks must take turns
  bool last_thread_first = false;               // the order in which threads run to their next barrier
  int64_t static_bytes = 0;                     // of a kernel's shared memory, where the driver knows it
  std::map<const void*, int64_t> granted;       // dynamic bytes that a kernel has asked for
} device;

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  ++block.steps;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&block.fibers[block.current], &block.scheduler);
}

inline void enter() {
  block.body();
  block.done[block.current] = 1;
  ++block.steps;
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
  block.body = body;
  block.all = {threads};
  block.warps.assign(threads / kWarp, {kWarp});
  block.slots.assign(threads, 0);
  block.done.assign(threads, 0);
  block.fibers.resize(threads);
  while (block.stacks.size() < threads) block.stacks.emplace_back(new char[kStack]);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&block.fibers[t]);
    block.fibers[t].uc_stack.ss_sp = block.stacks[t].get();
    block.fibers[t].uc_stack.ss_size = kStack;
    block.fibers[t].uc_link = &block.scheduler;
    makecontext(&block.fibers[t], enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    left = 0;
    const unsigned steps = block.steps;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = device.last_thread_first ? threads - 1 - i : i;
      if (block.done[t]) continue;
      block.current = t;
      swapcontext(&block.scheduler, &block.fibers[t]);
      left += !block.done[t];
    }
    if (left > 0 && block.steps == steps) {
      std::fputs("emulated CUDA: threads wait at different barriers\n", stderr);
      std::abort();
    }
  }
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return block.current; }
  } x;
};

// What every thread of this warp holds, after all of them have arrived.
template <typename T>
std::array<T, kWarp> gather(T value) {
  const unsigned warp = block.current / kWarp;
  std::memcpy(&block.slots[block.current], &value, sizeof(T));
  wait(block.warps[warp]);
  std::array<T, kWarp> values;
  for (unsigned lane = 0; lane < kWarp; ++lane) std::memcpy(&values[lane], &block.slots[warp * kWarp + lane], sizeof(T));
  wait(block.warps[warp]);
  return values;
}

}  // namespace emulated

inline emulated::ThreadIndex threadIdx;
inline dim3 blockIdx, blockDim, gridDim;

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulated::gather(value)[emulated::block.current % emulated::kWarp ^ static_cast<unsigned>(distance)];
}

inline uint32_t __ballot_sync(unsigned, bool set) {
  uint32_t word = 0;
  const auto votes = emulated::gather(set);
  for (unsigned lane = 0; lane < emulated::kWarp; ++lane) word |= uint32_t{votes[lane]} << lane;
  return word;
}

inline void __syncwarp() { emulated::wait(emulated::block.warps[emulated::block.current / emulated::kWarp]); }

inline void __syncthreads() { emulated::wait(emulated::block.all); }

inline int __syncthreads_or(bool set) {
  emulated::block.any = 0;
  __syncthreads();
  emulated::block.any |= set;
  __syncthreads();
  const unsigned any = emulated::block.any;
  __syncthreads();
  return static_cast<int>(any);
}

template <typename T>  // int or unsigned
T __reduce_add_sync(unsigned, T value) {
  T sum = 0;
  for (T held : emulated::gather(value)) sum += held;
  return sum;
}

inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

inline void __threadfence() {}

template <typename T>
T __ldg(const T* at) {
  return *at;
}

template <typename T>
T __ldcg(const T* at) {
  return *at;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __fmul_rn(float a, float b) { return a * b; }

inline float __fdividef(float a, float b) { return a / b; }

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, unsigned shift) { return high << shift | low >> (32 - shift); }

// ---- the host's side ----
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return std::memset(at, value, bytes), cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? emulated::device.processors : emulated::device.shared_bytes;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  if (bytes + emulated::device.static_bytes > emulated::device.shared_bytes)
    throw std::runtime_error("emulated CUDA: too much shared memory");
  emulated::device.granted[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const auto granted = emulated::device.granted.find(reinterpret_cast<const void*>(kernel));
  const int64_t most = granted == emulated::device.granted.end() ? (48 << 10) - emulated::device.static_bytes : granted->second;
  if (static_cast<int64_t>(config->dynamicSmemBytes) > most)
    throw std::runtime_error("emulated CUDA: more shared memory than a kernel may have without asking");
  ::gridDim = config->gridDim;
  ::blockDim = config->blockDim;
  for (unsigned z = 0; z < config->gridDim.z; ++z)
    for (unsigned y = 0; y < config->gridDim.y; ++y)
      for (unsigned x = 0; x < config->gridDim.x; ++x) {
        ::blockIdx = dim3(x, y, z);
        emulated::run_block(config->blockDim.x, [&] { kernel(arguments...); });
      }
  return cudaSuccess;
}
