// dmm::match and dmm::match_backward: schemas, and the CPU kernels behind run-time dispatch.
#include "match_cpu.h"

namespace dmm {
namespace {

const MatchKernels& kernels(bool alone) {
  static const MatchKernels& chosen = DMM_CHOOSE_KERNELS(match_kernels);
  static const MatchKernels& chosen_alone = DMM_CHOOSE_KERNELS(match_alone_kernels);
  return alone ? chosen_alone : chosen;
}

Tensor match(const Tensor& cost, const std::optional<Tensor>& init, const std::optional<Tensor>& num_templates,
             const std::optional<Tensor>& num_proposals, const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj,
             double lr, bool carry, bool last, const std::optional<Tensor>& unmatched_cost) {
  return run_forward(kernels(unmatched_cost.has_value()),
                     check_match_cpu("dmm::match", cost, init, num_templates, num_proposals, lr_tensor,
                                     {n_grad, n_proj, lr, carry, last}, unmatched_cost));
}

std::tuple<Tensor, Tensor, Tensor> match_backward(const Tensor& grad, const Tensor& cost, const std::optional<Tensor>& init,
                                                  const std::optional<Tensor>& num_templates,
                                                  const std::optional<Tensor>& num_proposals,
                                                  const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj,
                                                  double lr, bool carry, bool last,
                                                  const std::optional<Tensor>& unmatched_cost) {
  constexpr const char* op = "dmm::match_backward";
  MatchInputs in = check_match_cpu(op, cost, init, num_templates, num_proposals, lr_tensor, {n_grad, n_proj, lr, carry, last},
                                   unmatched_cost);
  Tensor grad_init;
  auto [grad_cost, grad_lr] =
      run_backward(kernels(unmatched_cost.has_value()), std::move(in), check_match_grad(op, grad, cost), &grad_init);
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
