// Eq. 8 straight from boxes and small masks: out_i = sum_j X_ij paste(mask_j, box_j), without M full-size masks.
// What every backend is given, and the checks none of them can be entered without.
#pragma once

#include "check.h"
#include "paste_geometry.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

namespace dmm {

inline constexpr const char* kPasteCombineSchema =
    "paste_combine(Tensor assignment, Tensor masks, Tensor boxes, SymInt height, SymInt width) -> Tensor";
inline constexpr const char* kPasteCombineBackwardSchema =
    "paste_combine_backward(Tensor grad, Tensor assignment, Tensor masks, Tensor boxes) -> (Tensor grad_assignment, "
    "Tensor grad_masks)";

// Checked, contiguous inputs; boxes are [M, 4] x0 y0 x1 y1 in pixels.
struct PasteInputs {
  Tensor assignment, masks, boxes;  // [N, M], [M, S, S], [M, 4]
  int64_t N, M, S, H, W;
};

inline PasteInputs check_paste(const char* op, const Tensor& assignment, const Tensor& masks, const Tensor& boxes,
                               int64_t height, int64_t width) {
  DMM_CHECK(assignment.dim() == 2, op, ": assignment must have shape [N, M], got ", shape_of(assignment));
  const int64_t N = assignment.size(0), M = assignment.size(1);
  DMM_CHECK(masks.dim() == 3 && masks.size(0) == M && masks.size(1) == masks.size(2), op,
            ": masks must have shape [M, S, S] with M = ", M, ", got ", shape_of(masks));
  DMM_CHECK(boxes.dim() == 2 && boxes.size(0) == M && boxes.size(1) == 4, op, ": boxes must have shape [M, 4] with M = ", M,
            ", got ", shape_of(boxes));
  const ScalarType type = assignment.scalar_type();
  DMM_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16,
            op, ": assignment must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(type));
  check_dtype(op, "masks", masks, type);
  // Eight bits of mantissa cannot hold a pixel's position: boxes stay in the type that is computed in.
  check_dtype(op, "boxes", boxes, type == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_same_device(op, "masks", masks, "assignment", assignment);
  check_same_device(op, "boxes", boxes, "assignment", assignment);
  constexpr int64_t limit = int64_t{1} << 24;  // pixel positions are exact in float32
  DMM_CHECK(0 <= height && height < limit && 0 <= width && width < limit, op, ": height and width must be in [0, 2^24), got ",
            height, " and ", width);
  return {torch::stable::contiguous(assignment),
          torch::stable::contiguous(masks),
          torch::stable::contiguous(boxes),
          N,
          M,
          masks.size(1),
          height,
          width};
}

struct PasteBackwardInputs : PasteInputs {
  Tensor grad;  // [N, H, W]
};

inline PasteBackwardInputs check_paste_backward(const Tensor& grad, const Tensor& assignment, const Tensor& masks,
                                                const Tensor& boxes) {
  constexpr const char* op = "dmm::paste_combine_backward";
  DMM_CHECK(grad.dim() == 3 && assignment.dim() == 2 && grad.size(0) == assignment.size(0), op,
            ": grad must have shape [N, H, W] for assignment [N, M], got ", shape_of(grad), " for ", shape_of(assignment));
  check_dtype(op, "grad", grad, assignment.scalar_type());
  check_same_device(op, "grad", grad, "assignment", assignment);
  return {check_paste(op, assignment, masks, boxes, grad.size(1), grad.size(2)), torch::stable::contiguous(grad)};
}

}  // namespace dmm
