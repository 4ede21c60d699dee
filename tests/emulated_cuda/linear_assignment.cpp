#include "layer.h"

#include "../../csrc/cuda/linear_assignment.cuh"

// sizes: B, N, M. Prices null: not wanted.
extern "C" void linear_assignment(const void* cost, const void* unmatched, int64_t unmatched_stride,
                                  const int64_t* num_templates, const int64_t* num_proposals, const int64_t* sizes, int element,
                                  int64_t* choice, void* template_prices, void* proposal_prices) {
  using dmm::cuda::Element;
  const auto given = static_cast<Element>(element);
  emulated::device.static_bytes = dmm::cuda::assignment::Team::kOwnBytes;
  std::memset(dmm::cuda::shared_memory, 0xff, sizeof(dmm::cuda::shared_memory));
  dmm::cuda::assignment::solve({{cost, unmatched, unmatched_stride, num_templates, num_proposals, sizes[0], sizes[1], sizes[2],
                                 choice, template_prices, proposal_prices},
                                given,
                                given == Element::f64 ? given : Element::f32},
                               nullptr, Scratch());
}
