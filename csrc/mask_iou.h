// Mask IoU: what every backend is given, and the checks none of them can be entered without.
#pragma once

#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace dmm {

inline constexpr const char* kMaskIouSchema = "mask_iou(Tensor a, Tensor b) -> Tensor";

// Checked, contiguous masks: a is B times [N, pixels], b is B times [M, pixels], one byte per pixel, set where not 0.
struct MaskIouInputs {
  Tensor a, b;
  int64_t B, N, M, pixels;

  const uint8_t* a_of(int64_t batch) const { return static_cast<const uint8_t*>(a.data_ptr()) + batch * N * pixels; }
  const uint8_t* b_of(int64_t batch) const { return static_cast<const uint8_t*>(b.data_ptr()) + batch * M * pixels; }

  Tensor new_result() const {
    return a.dim() == 4 ? torch::stable::new_empty(a, {B, N, M}, ScalarType::Float)
                        : torch::stable::new_empty(a, {N, M}, ScalarType::Float);
  }
};

inline MaskIouInputs check_mask_iou(const Tensor& a, const Tensor& b) {
  constexpr const char* op = "dmm::mask_iou";
  DMM_CHECK(a.dim() == 3 || a.dim() == 4, op, ": a must have shape [N, H, W] or [B, N, H, W], got ", shape_of(a));
  const int64_t d = a.dim();
  DMM_CHECK(
      b.dim() == d && b.size(d - 2) == a.size(d - 2) && b.size(d - 1) == a.size(d - 1) && (d == 3 || b.size(0) == a.size(0)),
      op, ": b must have the shape of a ", shape_of(a), " except for the number of masks, got ", shape_of(b));
  check_dtype(op, "a", a, ScalarType::Bool);
  check_dtype(op, "b", b, ScalarType::Bool);
  check_same_device(op, "b", b, "a", a);
  const int64_t pixels = a.size(d - 2) * a.size(d - 1);
  DMM_CHECK(pixels < (int64_t{1} << 31), op, ": H * W must be below 2^31, got ", pixels);
  return {
      torch::stable::contiguous(a), torch::stable::contiguous(b), d == 4 ? a.size(0) : 1, a.size(d - 3), b.size(d - 3), pixels};
}

}  // namespace dmm
