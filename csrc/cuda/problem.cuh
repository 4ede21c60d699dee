// A matching problem as the kernels get it.
#pragma once

#include "../match_problem.h"

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace dmm::cuda {

enum class Element { f32, f64, f16, bf16 };  // of cost, init, gradients and results

struct Problem : MatchProblem<void> {
  Element element;
  double scale;  // output_scale(options)
};

alignas(16) extern __shared__ unsigned char shared_memory[];

struct Gradients {
  const void* grad;
  void *cost, *init, *lr;
};

}  // namespace dmm::cuda
