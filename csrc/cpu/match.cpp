// dmm::match and dmm::match_backward: schemas, and the CPU kernels behind run-time dispatch.
#include "../match.h"

#include "match_kernel.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace dmm {
namespace {

// The widest instruction set of this machine; DMM_CPU_CAPABILITY=portable|avx2|avx512 lowers the choice (tests, benchmarks).
std::string_view choose_capability() {
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

std::string_view capability() {
  static const std::string_view chosen = choose_capability();
  return chosen;
}

template <typename T>
const MatchKernels<T>& kernels() {
  const auto of = [](const MatchKernels<float>& f, const MatchKernels<double>& d) -> const MatchKernels<T>& {
    if constexpr (std::is_same_v<T, float>)
      return f;
    else
      return d;
  };
#if defined(__x86_64__)
  if (capability() == "avx512") return of(avx512::kernels_float, avx512::kernels_double);
  if (capability() == "avx2") return of(avx2::kernels_float, avx2::kernels_double);
#endif
  return of(portable::kernels_float, portable::kernels_double);
}

// Lanes across problems once they are filled well enough to win (measured: docs/performance.md), as long as a group's
// arrays stay in a private cache.
template <typename T>
bool across_problems(const MatchInputs& in) {
  const int64_t lanes = kernels<T>().lanes;
  const int64_t group_bytes = in.N * in.M * lanes * static_cast<int64_t>(sizeof(T));
  return in.B >= lanes && group_bytes <= (256 << 10);
}

// Runs run(across, first, last) over the groups of the batch on torch's thread pool.
template <typename T, typename Run>
void for_groups(const MatchInputs& in, const Run& run) {
  const bool across = across_problems<T>(in);
  const int64_t lanes = across ? kernels<T>().lanes : 1;
  const int64_t groups = (in.B + lanes - 1) / lanes;
  // A thread is worth waking for about 20 us of work: some 10 problems at the paper's setting.
  const int64_t work = in.N * in.M * in.options.n_grad * in.options.n_proj * lanes;
  const int64_t grain = std::max<int64_t>(1, 500'000 / std::max<int64_t>(1, work));
  if (groups <= grain)
    run(across, 0, groups);
  else
    torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) { run(across, first, last); });
}

void check_counts(const char* op, const char* name, const std::optional<Tensor>& counts, int64_t limit) {
  if (!counts) return;
  const int64_t* count = data_of<int64_t>(counts);
  for (int64_t b = 0; b < counts->size(0); ++b)
    DMM_CHECK(count[b] >= 0 && count[b] <= limit, op, ": ", name, " must be in [0, ", limit, "], got ", count[b], " at ", b);
}

MatchInputs check_match_cpu(const char* op, const Tensor& cost, const std::optional<Tensor>& init,
                            const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals,
                            const std::optional<Tensor>& lr_tensor, const MatchOptions& options) {
  MatchInputs in = check_match(op, cost, init, num_templates, num_proposals, lr_tensor, options);
  check_counts(op, "num_templates", in.num_templates, in.N);
  check_counts(op, "num_proposals", in.num_proposals, in.M);
  return in;
}

// The kernels compute in float or double; half precision is widened here and narrowed in the result.
bool is_half(const Tensor& tensor) { return accumulate_type(tensor.scalar_type()) != tensor.scalar_type(); }

void widen(MatchInputs& in) {
  in.cost = torch::stable::to(in.cost, ScalarType::Float);
  if (in.init) in.init = torch::stable::to(*in.init, ScalarType::Float);
}

template <typename T>
void run_forward(const MatchInputs& in, Tensor& out) {
  const auto problem = problem_of<T>(in);
  for_groups<T>(in, [&, x = static_cast<T*>(out.data_ptr())](bool across, int64_t first, int64_t last) {
    kernels<T>().forward(problem, x, across, first, last);
  });
}

Tensor match(const Tensor& cost, const std::optional<Tensor>& init, const std::optional<Tensor>& num_templates,
             const std::optional<Tensor>& num_proposals, const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj,
             double lr, bool carry, bool last) {
  MatchInputs in =
      check_match_cpu("dmm::match", cost, init, num_templates, num_proposals, lr_tensor, {n_grad, n_proj, lr, carry, last});
  const bool half = is_half(cost);
  if (half) widen(in);
  Tensor out = new_like(in.cost);
  if (!in.empty()) {
    if (in.cost.scalar_type() == ScalarType::Double)
      run_forward<double>(in, out);
    else
      run_forward<float>(in, out);
  }
  return half ? torch::stable::to(out, cost.scalar_type()) : out;
}

template <typename T>
void run_backward(const MatchInputs& in, const Tensor& grad, Tensor& grad_cost, Tensor& grad_init, Tensor& grad_lr) {
  const auto problem = problem_of<T>(in);
  const T* g = static_cast<const T*>(grad.data_ptr());
  T *dc = static_cast<T*>(grad_cost.data_ptr()), *dx = static_cast<T*>(grad_init.data_ptr()),
    *dlr = static_cast<T*>(grad_lr.data_ptr());
  for_groups<T>(in, [&](bool across, int64_t first, int64_t last) {
    kernels<T>().backward(problem, g, dc, dx, dlr, across, first, last);
  });
}

std::tuple<Tensor, Tensor, Tensor> match_backward(const Tensor& grad, const Tensor& cost, const std::optional<Tensor>& init,
                                                  const std::optional<Tensor>& num_templates,
                                                  const std::optional<Tensor>& num_proposals,
                                                  const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj,
                                                  double lr, bool carry, bool last) {
  constexpr const char* op = "dmm::match_backward";
  MatchInputs in = check_match_cpu(op, cost, init, num_templates, num_proposals, lr_tensor, {n_grad, n_proj, lr, carry, last});
  Tensor g = check_match_grad(op, grad, cost);
  const bool half = is_half(cost);
  if (half) {
    widen(in);
    g = torch::stable::to(g, ScalarType::Float);
  }
  Tensor grad_cost = new_like(in.cost), grad_init = new_like(in.cost);
  Tensor grad_lr = torch::stable::new_zeros(in.cost, {in.B});
  if (!in.empty()) {
    if (in.cost.scalar_type() == ScalarType::Double)
      run_backward<double>(in, g, grad_cost, grad_init, grad_lr);
    else
      run_backward<float>(in, g, grad_cost, grad_init, grad_lr);
  }
  if (half) {
    grad_cost = torch::stable::to(grad_cost, cost.scalar_type());
    grad_init = torch::stable::to(grad_init, cost.scalar_type());
  }
  return {grad_cost, grad_init, grad_lr};
}

}  // namespace
}  // namespace dmm

// For dmm_fast.build_info().
extern "C" __attribute__((visibility("default"))) const char* dmm_cpu_capability() { return dmm::capability().data(); }

STABLE_TORCH_LIBRARY(dmm, m) {
  m.def(dmm::kMatchSchema);
  m.def(dmm::kMatchBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) {
  m.impl("match", TORCH_BOX(&dmm::match));
  m.impl("match_backward", TORCH_BOX(&dmm::match_backward));
}
