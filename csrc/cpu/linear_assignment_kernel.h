// The CPU kernels of dmm::linear_assignment, one set per instruction set; match_cpu.h picks at run time.
#pragma once

#include "../assignment_problem.h"

#include <type_traits>

namespace dmm {

// Problems [first, last) of the batch.
struct AssignmentKernels {
  void (*in_float)(const AssignmentProblem<float>& problem, int64_t first, int64_t last);
  void (*in_double)(const AssignmentProblem<double>& problem, int64_t first, int64_t last);

  template <typename T>
  auto in() const {
    if constexpr (std::is_same_v<T, float>)
      return in_float;
    else
      return in_double;
  }
};

#define DMM_DECLARE_KERNELS(isa)                     \
  namespace isa {                                    \
  extern const AssignmentKernels assignment_kernels; \
  }
DMM_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
DMM_DECLARE_KERNELS(avx2)
DMM_DECLARE_KERNELS(avx512)
#endif
#undef DMM_DECLARE_KERNELS

}  // namespace dmm
