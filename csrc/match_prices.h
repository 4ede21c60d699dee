// The matching problem solved by Newton prices (docs/variants.md): schema, and the checks no backend can be entered without.
// The problem, the counts and the error messages are those of dmm::match; there is no start.
#pragma once

#include "match.h"

namespace dmm {

inline constexpr const char* kMatchPricesSchema =
    "match_prices(Tensor cost, Tensor? num_templates=None, Tensor? num_proposals=None, Tensor? lr_tensor=None, "
    "int n_grad=40, int n_proj=1, float lr=10.0, bool last=True, Tensor? unmatched_cost=None) -> Tensor";
inline constexpr const char* kMatchPricesBackwardSchema =
    "match_prices_backward(Tensor grad, Tensor cost, Tensor? num_templates, Tensor? num_proposals, Tensor? lr_tensor, "
    "int n_grad, int n_proj, float lr, bool last, Tensor? unmatched_cost=None) -> (Tensor grad_cost, Tensor grad_lr)";

}  // namespace dmm
