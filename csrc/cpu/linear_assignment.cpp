// dmm::linear_assignment and dmm::linear_assignment_duals: schemas, and the CPU kernels behind run-time dispatch.
#include "../linear_assignment.h"

#include "linear_assignment_kernel.h"
#include "match_cpu.h"

namespace dmm {
namespace {

const AssignmentKernels& kernels() {
  static const AssignmentKernels& chosen = DMM_CHOOSE_KERNELS(assignment_kernels);
  return chosen;
}

template <typename T>
void solve(const AssignmentProblem<T>& p) {
  // A thread is worth waking for about 20 us of work; an element costs some nanoseconds.
  const int64_t grain = std::max<int64_t>(1, 8'000 / (p.N * p.M + 100));
  const auto run = kernels().in<T>();
  if (p.B <= grain)
    run(p, 0, p.B);
  else
    torch::stable::parallel_for(0, p.B, grain, [&](int64_t first, int64_t last) { run(p, first, last); });
}

AssignmentOutputs solve(const char* op, const Tensor& cost, const std::optional<Tensor>& unmatched_cost,
                        const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals, bool duals) {
  MatchInputs in = check_assignment(op, cost, unmatched_cost, num_templates, num_proposals);
  check_values(op, in);
  const AssignmentOutputs out(cost, in, duals);
  if (is_half(in.cost)) widen(in);
  if (cost.scalar_type() == ScalarType::Double)
    solve(problem_of<double>(in, out, duals));
  else
    solve(problem_of<float>(in, out, duals));
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
}  // namespace dmm

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) {
  m.def(dmm::kLinearAssignmentSchema);
  m.def(dmm::kLinearAssignmentDualsSchema);
}

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) {
  m.impl("linear_assignment", TORCH_BOX(&dmm::linear_assignment));
  m.impl("linear_assignment_duals", TORCH_BOX(&dmm::linear_assignment_duals));
}
