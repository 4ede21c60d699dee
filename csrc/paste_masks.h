// How much of each cell of a grid a pasted mask covers, for M small masks and boxes: where a threshold follows the paste.
// What every backend is given, and the checks none of them can be entered without.
#pragma once

#include "check.h"
#include "paste_geometry.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace dmm {

inline constexpr const char* kPasteMasksSchema =
    "paste_masks(Tensor masks, Tensor boxes, SymInt rows, SymInt columns, int samples) -> Tensor";

// Checked, contiguous inputs; boxes are [M, 4] x0 y0 x1 y1 in cells.
struct PasteMasksInputs {
  Tensor masks, boxes;  // [M, S, S], [M, 4]
  int64_t M, S, rows, columns, samples;
};

inline PasteMasksInputs check_paste_masks(const Tensor& masks, const Tensor& boxes, int64_t rows, int64_t columns,
                                          int64_t samples) {
  constexpr const char* op = "dmm::paste_masks";
  DMM_CHECK(masks.dim() == 3 && masks.size(1) == masks.size(2), op, ": masks must have shape [M, S, S], got ", shape_of(masks));
  const int64_t M = masks.size(0);
  DMM_CHECK(boxes.dim() == 2 && boxes.size(0) == M && boxes.size(1) == 4, op, ": boxes must have shape [M, 4] with M = ", M,
            ", got ", shape_of(boxes));
  const ScalarType type = masks.scalar_type();
  DMM_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16,
            op, ": masks must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(type));
  // Eight bits of mantissa cannot hold a position: boxes stay in the type that is computed in.
  check_dtype(op, "boxes", boxes, type == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  check_same_device(op, "boxes", boxes, "masks", masks);
  constexpr int64_t limit = int64_t{1} << 24;  // positions are exact in float32
  DMM_CHECK(1 <= samples && samples <= 64, op, ": samples must be in [1, 64], got ", samples);
  DMM_CHECK(0 <= rows && rows < limit / samples && 0 <= columns && columns < limit / samples, op,
            ": rows and columns must be in [0, 2^24 / samples), got ", rows, " and ", columns);
  return {torch::stable::contiguous(masks), torch::stable::contiguous(boxes), M, masks.size(1), rows, columns, samples};
}

}  // namespace dmm
