// dmm::match and dmm::match_backward on CUDA tensors: the current stream, one launch, no wait for the device.
#include "current_stream.h"
#include "match_launch.cuh"
#include "match_tensors.h"

namespace dmm::cuda {
namespace {

Tensor match(const Tensor& cost, const std::optional<Tensor>& init, const std::optional<Tensor>& num_templates,
             const std::optional<Tensor>& num_proposals, const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj,
             double lr, bool carry, bool last, const std::optional<Tensor>& unmatched_cost) {
  const CurrentStream current(cost);
  const MatchInputs in = check_match("dmm::match", cost, init, num_templates, num_proposals, lr_tensor,
                                     {n_grad, n_proj, lr, carry, last}, unmatched_cost);
  Tensor out = torch::stable::empty_like(in.cost);
  if (!in.empty()) forward<Match>(problem_on_device(in), out.data_ptr(), current.stream, Scratch(cost));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> match_backward(const Tensor& grad, const Tensor& cost, const std::optional<Tensor>& init,
                                                  const std::optional<Tensor>& num_templates,
                                                  const std::optional<Tensor>& num_proposals,
                                                  const std::optional<Tensor>& lr_tensor, int64_t n_grad, int64_t n_proj,
                                                  double lr, bool carry, bool last,
                                                  const std::optional<Tensor>& unmatched_cost) {
  constexpr const char* op = "dmm::match_backward";
  const CurrentStream current(cost);
  const MatchInputs in =
      check_match(op, cost, init, num_templates, num_proposals, lr_tensor, {n_grad, n_proj, lr, carry, last}, unmatched_cost);
  const Tensor g = check_match_grad(op, grad, cost);
  Tensor grad_cost = torch::stable::empty_like(in.cost);
  Tensor grad_init = torch::stable::empty_like(in.cost);
  const ScalarType accumulate = accumulate_type(cost.scalar_type());
  if (in.empty()) return {grad_cost, grad_init, torch::stable::new_zeros(cost, {in.B}, accumulate)};
  Tensor grad_lr = torch::stable::new_empty(cost, {in.B}, accumulate);
  backward<Match>(problem_on_device(in), {g.data_ptr(), grad_cost.data_ptr(), grad_init.data_ptr(), grad_lr.data_ptr()},
                  current.stream, Scratch(cost));
  return {grad_cost, grad_init, grad_lr};
}

}  // namespace
}  // namespace dmm::cuda

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) {
  m.impl("match", TORCH_BOX(&dmm::cuda::match));
  m.impl("match_backward", TORCH_BOX(&dmm::cuda::match_backward));
}
