// dmm::linear_assignment and dmm::linear_assignment_duals on CUDA tensors: the current stream, one launch, no wait for the
// device.
#include "../linear_assignment.h"

#include "current_stream.h"
#include "linear_assignment.cuh"
#include "match_tensors.h"

namespace dmm::cuda {
namespace {

AssignmentOutputs solve(const char* op, const Tensor& cost, const std::optional<Tensor>& unmatched_cost,
                        const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals, bool duals) {
  const CurrentStream current(cost);
  const MatchInputs in = check_assignment(op, cost, unmatched_cost, num_templates, num_proposals);
  const AssignmentOutputs out(cost, in, duals);
  const Element element = element_of(cost);
  if (in.B > 0)
    assignment::solve({problem_of<void, void>(in, out, duals), element, element == Element::f64 ? element : Element::f32},
                      current.stream, Scratch(cost));
  return out;
}

Tensor linear_assignment(const Tensor& cost, const std::optional<Tensor>& unmatched_cost,
                         const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals) {
  return solve("dmm::linear_assignment", cost, unmatched_cost, num_templates, num_proposals, false).choice;
}

std::tuple<Tensor, Tensor, Tensor> linear_assignment_duals(const Tensor& cost, const std::optional<Tensor>& unmatched_cost,
                                                           const std::optional<Tensor>& num_templates,
                                                           const std::optional<Tensor>& num_proposals) {
  const AssignmentOutputs out = solve("dmm::linear_assignment_duals", cost, unmatched_cost, num_templates, num_proposals, true);
  return {out.choice, out.template_prices, out.proposal_prices};
}

}  // namespace
}  // namespace dmm::cuda

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) {
  m.impl("linear_assignment", TORCH_BOX(&dmm::cuda::linear_assignment));
  m.impl("linear_assignment_duals", TORCH_BOX(&dmm::cuda::linear_assignment_duals));
}
