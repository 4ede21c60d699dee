// A convolution's bias, what is added and its activation on CUDA: a thread takes 16 bytes where they lie right, else an
// element.
#pragma once

#include "launch.h"

#include <cstdint>

namespace dmm::finish {

constexpr int kThreads = 256;

// T is the element type of tensors, C the type of computations.
template <typename T, typename C>
struct Problem {
  const T *x, *bias, *residual;     // images in one dense order, [C], images or null
  unsigned numel, channels, inner;  // of the result, whose element i has channel i / inner % channels
  unsigned taken, added;            // elements of x and of the residual, taken again from the first on
  C low, high;
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T of[V];
};

template <typename T, typename C, int V>
__global__ void __launch_bounds__(kThreads) bias_clamp_kernel(const Problem<T, C> p, T* __restrict__ out) {
  const unsigned i = (blockIdx.x * kThreads + threadIdx.x) * V;
  if (i >= p.numel) return;
  const unsigned channel = i / p.inner % p.channels, step = p.inner == 1 ? 1 : 0;
  Pack<T, V> x = *reinterpret_cast<const Pack<T, V>*>(p.x + i % p.taken), residual;
  if (p.residual) residual = *reinterpret_cast<const Pack<T, V>*>(p.residual + i % p.added);
  for (int k = 0; k < V; ++k) {
    C value = static_cast<C>(x.of[k]) + static_cast<C>(p.bias[channel + k * step]);
    if (p.residual) value += static_cast<C>(residual.of[k]);
    value = value < p.low ? p.low : value;  // not max: NaN stays
    x.of[k] = static_cast<T>(value > p.high ? p.high : value);
  }
  *reinterpret_cast<Pack<T, V>*>(out + i) = x;
}

// out as x, not empty.
template <typename T, typename C>
void bias_clamp(const char* op, const Problem<T, C>& p, T* out, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto places =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.residual) | reinterpret_cast<uintptr_t>(out);
  const bool packed = (p.inner == 1 ? p.channels : p.inner) % V == 0 && places % 16 == 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.numel, int64_t{kThreads} * (packed ? V : 1))));
  launch_kernel(op, packed ? bias_clamp_kernel<T, C, V> : bias_clamp_kernel<T, C, 1>, grid, kThreads, 0, stream, p, out);
}

}  // namespace dmm::finish
