// A sum over a warp's lanes, known to all of them.
#pragma once

#include <cuda_runtime.h>

namespace dmm::cuda {

// Every lane of the warp must be there. From 8.0 on one instruction does it.
template <typename T>
__device__ __forceinline__ T sum_lanes(T value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
#else
  return __reduce_add_sync(0xffffffffu, value);
#endif
}

}  // namespace dmm::cuda
