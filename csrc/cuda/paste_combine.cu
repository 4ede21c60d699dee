// dmm::paste_combine and its backward on CUDA tensors: the current stream, no wait for the device.
#include "../paste_combine.h"
#include "current_stream.h"
#include "element.h"
#include "paste_combine.cuh"

namespace dmm {
namespace {

constexpr int64_t kMaxBlocks = int64_t{1} << 31;

template <typename T, typename C>
paste::Problem<T, C> problem_of(const PasteInputs& in) {
  return {static_cast<const T*>(in.assignment.data_ptr()),
          static_cast<const T*>(in.masks.data_ptr()),
          static_cast<const C*>(in.boxes.data_ptr()),
          in.N,
          in.M,
          static_cast<int>(in.S),
          static_cast<int>(in.H),
          static_cast<int>(in.W)};
}

Tensor paste_combine(const Tensor& assignment, const Tensor& masks, const Tensor& boxes, int64_t height, int64_t width) {
  constexpr const char* op = "dmm::paste_combine";
  const PasteInputs in = check_paste(op, assignment, masks, boxes, height, width);
  const CurrentStream current(assignment);
  Tensor out = torch::stable::new_empty(in.assignment, {in.N, in.H, in.W});
  if (out.numel() == 0) return out;
  DMM_CHECK(in.H <= 4 * 65535 && in.N <= 4 * 65535, op,
            ": N and H must be at most 262140 on CUDA, got [N, H, W] = ", shape_of(out));
  for_type(assignment.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    paste::forward(op, problem_of<T, decltype(c)>(in), static_cast<T*>(out.data_ptr()), current.stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> paste_combine_backward(const Tensor& grad, const Tensor& assignment, const Tensor& masks,
                                                  const Tensor& boxes) {
  constexpr const char* op = "dmm::paste_combine_backward";
  const PasteBackwardInputs in = check_paste_backward(grad, assignment, masks, boxes);
  DMM_CHECK(in.S <= 4096, op, ": S must be at most 4096 on CUDA, got ", in.S);
  DMM_CHECK(in.M * in.S < kMaxBlocks && in.M * in.N < kMaxBlocks, op, ": too many masks for one call, got ", shape_of(masks));
  const CurrentStream current(assignment);
  Tensor grad_assignment = torch::stable::new_empty(in.assignment, {in.N, in.M});
  Tensor grad_masks = torch::stable::new_empty(in.masks, {in.M, in.S, in.S});
  const Tensor parts = torch::stable::new_empty(in.boxes, {in.M, in.S, in.N});  // boxes hold the type that is computed in
  for_type(assignment.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    paste::backward(op, problem_of<T, C>(in), static_cast<const T*>(in.grad.data_ptr()), static_cast<C*>(parts.data_ptr()),
                    static_cast<T*>(grad_assignment.data_ptr()), static_cast<T*>(grad_masks.data_ptr()), current.stream);
  });
  return {grad_assignment, grad_masks};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) {
  m.impl("paste_combine", TORCH_BOX(&paste_combine));
  m.impl("paste_combine_backward", TORCH_BOX(&paste_combine_backward));
}

}  // namespace dmm
