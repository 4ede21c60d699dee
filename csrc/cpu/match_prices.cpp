// dmm::match_prices and dmm::match_prices_backward: schemas, and the CPU kernels behind run-time dispatch.
#include "../match_prices.h"

#include "match_cpu.h"

namespace dmm {
namespace {

const MatchKernels& kernels(bool alone) {
  static const MatchKernels& chosen = DMM_CHOOSE_KERNELS(prices_kernels);
  static const MatchKernels& chosen_alone = DMM_CHOOSE_KERNELS(prices_alone_kernels);
  return alone ? chosen_alone : chosen;
}

MatchInputs check_prices_cpu(const char* op, const Tensor& cost, const std::optional<Tensor>& num_templates,
                             const std::optional<Tensor>& num_proposals, const std::optional<Tensor>& lr_tensor, int64_t n_grad,
                             int64_t n_proj, double lr, bool last, const std::optional<Tensor>& unmatched_cost) {
  return check_match_cpu(op, cost, std::nullopt, num_templates, num_proposals, lr_tensor,
                         {n_grad, n_proj, lr, /*carry=*/false, last}, unmatched_cost);
}

Tensor match_prices(const Tensor& cost, const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals,
                    const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj, double lr, bool last,
                    const std::optional<Tensor>& unmatched_cost) {
  return run_forward(kernels(unmatched_cost.has_value()),
                     check_prices_cpu("dmm::match_prices", cost, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr,
                                      last, unmatched_cost));
}

std::tuple<Tensor, Tensor> match_prices_backward(const Tensor& grad, const Tensor& cost,
                                                 const std::optional<Tensor>& num_templates,
                                                 const std::optional<Tensor>& num_proposals,
                                                 const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj,
                                                 double lr, bool last, const std::optional<Tensor>& unmatched_cost) {
  constexpr const char* op = "dmm::match_prices_backward";
  MatchInputs in =
      check_prices_cpu(op, cost, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, last, unmatched_cost);
  return run_backward(kernels(unmatched_cost.has_value()), std::move(in), check_match_grad(op, grad, cost), nullptr);
}

}  // namespace
}  // namespace dmm

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) {
  m.def(dmm::kMatchPricesSchema);
  m.def(dmm::kMatchPricesBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) {
  m.impl("match_prices", TORCH_BOX(&dmm::match_prices));
  m.impl("match_prices_backward", TORCH_BOX(&dmm::match_prices_backward));
}
