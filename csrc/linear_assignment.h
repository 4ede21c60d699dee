// The exact assignment (docs/assignment.md): schemas, and the checks no backend can be entered without. The cost, the counts
// and their error messages are those of dmm::match.
#pragma once

#include "assignment_problem.h"
#include "match.h"

namespace dmm {

inline constexpr const char* kLinearAssignmentSchema =
    "linear_assignment(Tensor cost, Tensor? unmatched_cost=None, Tensor? num_templates=None, Tensor? num_proposals=None) "
    "-> Tensor";
inline constexpr const char* kLinearAssignmentDualsSchema =
    "linear_assignment_duals(Tensor cost, Tensor? unmatched_cost=None, Tensor? num_templates=None, "
    "Tensor? num_proposals=None) -> (Tensor choice, Tensor template_prices, Tensor proposal_prices)";

inline MatchInputs check_assignment(const char* op, const Tensor& cost, const std::optional<Tensor>& unmatched_cost,
                                    const std::optional<Tensor>& num_templates, const std::optional<Tensor>& num_proposals) {
  const MatchOptions options{1, 1, 1.0, false, false};
  MatchInputs in = check_match(op, cost, std::nullopt, num_templates, num_proposals, std::nullopt, options, unmatched_cost);
  constexpr int64_t kMost = (int64_t{1} << 31) - 64;  // columns are counted in 32 bits
  DMM_CHECK(in.N <= kMost && in.M <= kMost, op, ": a problem must be smaller than 2^31 on each side, got ", shape_of(cost));
  return in;
}

// The results. `like` is the given cost.
struct AssignmentOutputs {
  Tensor choice, template_prices, proposal_prices;

  AssignmentOutputs(const Tensor& like, const MatchInputs& in, bool duals) {
    const auto make = [&](int64_t count, ScalarType type) {
      return like.dim() == 3 ? torch::stable::new_empty(like, {in.B, count}, type)
                             : torch::stable::new_empty(like, {count}, type);
    };
    choice = make(in.N, ScalarType::Long);
    if (!duals) return;
    template_prices = make(in.N, accumulate_type(like.scalar_type()));
    proposal_prices = make(in.M, accumulate_type(like.scalar_type()));
  }
};

template <typename T, typename Price = T>
AssignmentProblem<T, Price> problem_of(const MatchInputs& in, const AssignmentOutputs& out, bool duals) {
  return {static_cast<const T*>(in.cost.data_ptr()),
          data_of<Price>(in.unmatched),
          in.unmatched_stride(),
          data_of<int64_t>(in.num_templates),
          data_of<int64_t>(in.num_proposals),
          in.B,
          in.N,
          in.M,
          static_cast<int64_t*>(out.choice.data_ptr()),
          duals ? static_cast<Price*>(out.template_prices.data_ptr()) : nullptr,
          duals ? static_cast<Price*>(out.proposal_prices.data_ptr()) : nullptr};
}

}  // namespace dmm
