// What a matching kernel is given: pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace dmm {

struct MatchOptions {
  int64_t n_grad, n_proj;
  double lr;
  bool carry;  // Listing 1: Dykstra's corrections outlive an outer step, and the start counts in the average
  bool last;   // return X^{n_grad} and not the average
};

// The result is output_scale() times the sum of the iterates that count. (Internal linkage: the CPU kernels include this
// header in files compiled for different instruction sets, whose code must not be merged by the linker.)
static inline double output_scale(const MatchOptions& options) {
  return options.last ? 1.0 : 1.0 / static_cast<double>(options.n_grad + (options.carry ? 1 : 0));
}

// T is the element type of cost, Acc the type of computations.
template <typename T, typename Acc = T>
struct MatchProblem {
  const T* cost;                 // [B, N, M]
  const T* init;                 // [B, N, M] or null: zeros
  const int64_t* num_templates;  // [B] or null: N everywhere
  const int64_t* num_proposals;  // [B] or null: M everywhere
  const Acc* lr;                 // [B] (lr_stride 1), [1] (lr_stride 0) or null: options.lr
  int64_t lr_stride;
  const Acc* unmatched;  // [B, N] (unmatched_stride N), [N] (unmatched_stride 0) or null: every template takes a proposal
  int64_t unmatched_stride;
  int64_t B, N, M;
  MatchOptions options;
};

}  // namespace dmm
