// What the matching ops share on the CPU: the choice of kernels, the thread pool, half precision.
#pragma once

#include "../match.h"

#include "match_kernel.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace dmm {

// The widest instruction set of this machine; DMM_CPU_CAPABILITY=portable|avx2|avx512 lowers the choice (tests, benchmarks).
inline std::string_view choose_capability() {
#if defined(__x86_64__)
  const char* wish = std::getenv("DMM_CPU_CAPABILITY");
  const std::string_view limit = wish ? wish : "avx512";
  if (limit == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return "avx512";
  if (limit != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "portable";
}

inline std::string_view capability() {
  static const std::string_view chosen = choose_capability();
  return chosen;
}

#if defined(__x86_64__)
#define DMM_CHOOSE_KERNELS(kernels) \
  (::dmm::capability() == "avx512" ? avx512::kernels : ::dmm::capability() == "avx2" ? avx2::kernels : portable::kernels)
#else
#define DMM_CHOOSE_KERNELS(kernels) portable::kernels
#endif

// Lanes across problems once they are filled well enough to win (measured: docs/performance.md), as long as a group's
// arrays stay in a private cache.
template <typename T>
bool across_problems(const MatchInputs& in, int64_t lanes) {
  const int64_t group_bytes = in.N * in.M * lanes * static_cast<int64_t>(sizeof(T));
  return in.B >= lanes && group_bytes <= (256 << 10);
}

// Runs run(across, first, last) over the groups of the batch on torch's thread pool.
template <typename T, typename Run>
void for_groups(const MatchInputs& in, int64_t kernel_lanes, const Run& run) {
  const bool across = across_problems<T>(in, kernel_lanes);
  const int64_t lanes = across ? kernel_lanes : 1;
  const int64_t groups = (in.B + lanes - 1) / lanes;
  // A thread is worth waking for about 20 us of work: some 10 problems at the paper's setting.
  const int64_t work = in.N * in.M * in.options.n_grad * in.options.n_proj * lanes;
  const int64_t grain = std::max<int64_t>(1, 500'000 / std::max<int64_t>(1, work));
  if (groups <= grain)
    run(across, 0, groups);
  else
    torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) { run(across, first, last); });
}

inline void check_counts(const char* op, const char* name, const std::optional<Tensor>& counts, int64_t limit) {
  if (!counts) return;
  const int64_t* count = data_of<int64_t>(counts);
  for (int64_t b = 0; b < counts->size(0); ++b)
    DMM_CHECK(count[b] >= 0 && count[b] <= limit, op, ": ", name, " must be in [0, ", limit, "], got ", count[b], " at ", b);
}

// Padding may hold anything.
template <typename T>
void check_unmatched(const char* op, const MatchInputs& in) {
  const T* const unmatched = data_of<T>(in.unmatched);
  const int64_t* const num_templates = data_of<int64_t>(in.num_templates);
  for (int64_t b = 0; b < in.B; ++b) {
    const int64_t n = num_templates ? num_templates[b] : in.N;
    const T* const own = unmatched + b * in.unmatched_stride();
    for (int64_t r = 0; r < n; ++r)
      DMM_CHECK(std::isfinite(own[r]), op, ": unmatched_cost must be finite, got ", own[r], " for template ", r, " of problem ",
                b);
  }
}

// What can only be checked by looking into the tensors.
inline void check_values(const char* op, const MatchInputs& in) {
  check_counts(op, "num_templates", in.num_templates, in.N);
  check_counts(op, "num_proposals", in.num_proposals, in.M);
  if (!in.unmatched) return;
  if (in.unmatched->scalar_type() == ScalarType::Double)
    check_unmatched<double>(op, in);
  else
    check_unmatched<float>(op, in);
}

inline MatchInputs check_match_cpu(const char* op, const Tensor& cost, const std::optional<Tensor>& init,
                                   const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals,
                                   const std::optional<Tensor>& lr_tensor, const MatchOptions& options,
                                   const std::optional<Tensor>& unmatched_cost) {
  MatchInputs in = check_match(op, cost, init, num_templates, num_proposals, lr_tensor, options, unmatched_cost);
  check_values(op, in);
  return in;
}

// The kernels compute in float or double; half precision is widened here and narrowed in the result.
inline bool is_half(const Tensor& tensor) { return accumulate_type(tensor.scalar_type()) != tensor.scalar_type(); }

inline void widen(MatchInputs& in) {
  in.cost = torch::stable::to(in.cost, ScalarType::Float);
  if (in.init) in.init = torch::stable::to(*in.init, ScalarType::Float);
}

template <typename T>
void run_forward(const MatchKernels& kernels, const MatchInputs& in, Tensor& out) {
  const auto problem = problem_of<T>(in);
  const auto& kernel = kernels.in<T>();
  for_groups<T>(in, kernel.lanes, [&, x = static_cast<T*>(out.data_ptr())](bool across, int64_t first, int64_t last) {
    kernel.forward(problem, x, across, first, last);
  });
}

inline Tensor run_forward(const MatchKernels& kernels, MatchInputs in) {
  const ScalarType type = in.cost.scalar_type();
  const bool half = is_half(in.cost);
  if (half) widen(in);
  Tensor out = new_like(in.cost);
  if (!in.empty()) {
    if (type == ScalarType::Double)
      run_forward<double>(kernels, in, out);
    else
      run_forward<float>(kernels, in, out);
  }
  return half ? torch::stable::to(out, type) : out;
}

template <typename T>
void run_backward(const MatchKernels& kernels, const MatchInputs& in, const Tensor& grad, Tensor& grad_cost, Tensor* grad_init,
                  Tensor& grad_lr) {
  const auto problem = problem_of<T>(in);
  const auto& kernel = kernels.in<T>();
  const auto data = [](const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); };
  for_groups<T>(
      in, kernel.lanes,
      [&, g = data(grad), dc = data(grad_cost), dx = grad_init ? data(*grad_init) : nullptr, dlr = data(grad_lr)](
          bool across, int64_t first, int64_t last) { kernel.backward(problem, g, dc, dx, dlr, across, first, last); });
}

// (grad_cost, grad_lr), and grad_init where the op has a start.
inline std::tuple<Tensor, Tensor> run_backward(const MatchKernels& kernels, MatchInputs in, Tensor grad, Tensor* grad_init) {
  const ScalarType type = in.cost.scalar_type();
  const bool half = is_half(in.cost);
  if (half) {
    widen(in);
    grad = torch::stable::to(grad, ScalarType::Float);
  }
  Tensor grad_cost = new_like(in.cost);
  Tensor grad_lr = torch::stable::new_zeros(in.cost, {in.B});
  if (grad_init) *grad_init = new_like(in.cost);
  if (!in.empty()) {
    if (type == ScalarType::Double)
      run_backward<double>(kernels, in, grad, grad_cost, grad_init, grad_lr);
    else
      run_backward<float>(kernels, in, grad, grad_cost, grad_init, grad_lr);
  }
  if (half) {
    grad_cost = torch::stable::to(grad_cost, type);
    if (grad_init) *grad_init = torch::stable::to(*grad_init, type);
  }
  return {grad_cost, grad_lr};
}

}  // namespace dmm
