// What the CPU kernels of the vision ops share.
#pragma once

#include "../check.h"

#include <torch/csrc/stable/ops.h>

// Row loops are plain; the compiler vectorises them once per instruction set and the loader picks.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define DMM_ROW_LOOP __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DMM_ROW_LOOP
#endif

namespace dmm {

inline bool is_half(ScalarType type) { return type == ScalarType::Half || type == ScalarType::BFloat16; }

// Half types are stored, never computed in.
inline Tensor to_compute(const Tensor& tensor) {
  return is_half(tensor.scalar_type()) ? torch::stable::to(tensor, ScalarType::Float) : tensor;
}

}  // namespace dmm
