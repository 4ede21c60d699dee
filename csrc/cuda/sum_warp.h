// A sum over a warp's lanes, known to all of them.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace dmm {

// Every lane of the warp must be there. Of 32-bit integers one instruction does it from 8.0 on.
template <typename T>
__device__ __forceinline__ T sum_warp(T value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  constexpr bool kOneInstruction = false;
#else
  constexpr bool kOneInstruction = std::is_integral_v<T>;
#endif
  if constexpr (kOneInstruction) {
    return __reduce_add_sync(0xffffffffu, value);
  } else {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
  }
}

}  // namespace dmm
