// The CPU kernels of the matching layers, one set per instruction set; match_cpu.h picks at run time.
#pragma once

#include "../match_problem.h"

#include <type_traits>

namespace dmm {

template <typename T>
struct MatchKernelsOf {
  int lanes;  // problems that one group works on when lanes run across problems

  // Groups [first, last) of the batch; a group is one problem, or `lanes` neighbouring ones if `across_problems`.
  void (*forward)(const MatchProblem<T>& problem, T* out, bool across_problems, int64_t first, int64_t last);
  void (*backward)(const MatchProblem<T>& problem, const T* grad, T* grad_cost, T* grad_init, T* grad_lr, bool across_problems,
                   int64_t first, int64_t last);
};

struct MatchKernels {
  MatchKernelsOf<float> in_float;
  MatchKernelsOf<double> in_double;

  template <typename T>
  const MatchKernelsOf<T>& in() const {
    if constexpr (std::is_same_v<T, float>)
      return in_float;
    else
      return in_double;
  }
};

// prices_kernels: dmm::match_prices, which has no start (grad_init is null). *_alone_kernels: for problems with `unmatched`.
#define DMM_DECLARE_KERNELS(isa)                                                                      \
  namespace isa {                                                                                     \
  extern const MatchKernels match_kernels, match_alone_kernels, prices_kernels, prices_alone_kernels; \
  }
DMM_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
DMM_DECLARE_KERNELS(avx2)
DMM_DECLARE_KERNELS(avx512)
#endif
#undef DMM_DECLARE_KERNELS

}  // namespace dmm
