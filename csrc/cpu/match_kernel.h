// The CPU kernels of the matching layer, one set per instruction set; match.cpp picks at run time.
#pragma once

#include "../match_problem.h"

namespace dmm {

template <typename T>
struct MatchKernels {
  int lanes;  // problems that one group works on when lanes run across problems

  // Groups [first, last) of the batch; a group is one problem, or `lanes` neighbouring ones if `across_problems`.
  void (*forward)(const MatchProblem<T>& problem, T* out, bool across_problems, int64_t first, int64_t last);
  void (*backward)(const MatchProblem<T>& problem, const T* grad, T* grad_cost, T* grad_init, T* grad_lr, bool across_problems,
                   int64_t first, int64_t last);
};

#define DMM_DECLARE_KERNELS(isa)                    \
  namespace isa {                                   \
  extern const MatchKernels<float> kernels_float;   \
  extern const MatchKernels<double> kernels_double; \
  }
DMM_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
DMM_DECLARE_KERNELS(avx2)
DMM_DECLARE_KERNELS(avx512)
#endif
#undef DMM_DECLARE_KERNELS

}  // namespace dmm
