// What an exact assignment kernel is given: pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace dmm {

// T is the element type of cost, Price that of prices and of the costs of staying alone.
template <typename T, typename Price = T>
struct AssignmentProblem {
  const T* cost;           // [B, N, M]
  const Price* unmatched;  // [B, N] (unmatched_stride N), [N] (unmatched_stride 0) or null: whoever can be matched is
  int64_t unmatched_stride;
  const int64_t* num_templates;  // [B] or null: N everywhere
  const int64_t* num_proposals;  // [B] or null: M everywhere
  int64_t B, N, M;
  int64_t* choice;         // [B, N]: the proposal of each template, -1 for none
  Price* template_prices;  // [B, N]; both null: not wanted (one is null where it is empty)
  Price* proposal_prices;  // [B, M]
};

}  // namespace dmm
