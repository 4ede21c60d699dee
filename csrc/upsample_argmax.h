// One label per pixel from small logits, enlarged bilinearly: the argmax without N full-size logits.
// What every backend is given, and the checks none of them can be entered without.
#pragma once

#include "cell_geometry.h"
#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace dmm {

inline constexpr const char* kUpsampleArgmaxSchema =
    "upsample_argmax(Tensor logits, Tensor rank, SymInt height, SymInt width) -> Tensor";

// Checked, contiguous inputs.
struct UpsampleInputs {
  Tensor logits, rank;    // [N, h, w], [N]
  int64_t N, h, w, H, W;  // the result has H x W pixels

  Tensor new_result() const { return torch::stable::new_empty(logits, {H, W}, ScalarType::Byte); }
};

inline UpsampleInputs check_upsample_argmax(const Tensor& logits, const Tensor& rank, int64_t height, int64_t width) {
  constexpr const char* op = "dmm::upsample_argmax";
  DMM_CHECK(logits.dim() == 3, op, ": logits must have shape [N, h, w], got ", shape_of(logits));
  const int64_t N = logits.size(0), h = logits.size(1), w = logits.size(2);
  DMM_CHECK(N <= 255, op, ": a label is a byte: N must be at most 255, got ", N);
  DMM_CHECK(rank.dim() == 1 && rank.size(0) == N, op, ": rank must have shape [N] with N = ", N, ", got ", shape_of(rank));
  const ScalarType type = logits.scalar_type();
  DMM_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16,
            op, ": logits must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(type));
  check_dtype(op, "rank", rank, ScalarType::Long);
  check_same_device(op, "rank", rank, "logits", logits);
  constexpr int64_t limit = int64_t{1} << 24;
  DMM_CHECK(0 < h && h < limit && 0 < w && w < limit, op, ": h and w of logits must be in [1, 2^24), got ", shape_of(logits));
  DMM_CHECK(0 <= height && height < limit && 0 <= width && width < limit, op, ": height and width must be in [0, 2^24), got ",
            height, " and ", width);
  return {torch::stable::contiguous(logits), torch::stable::contiguous(rank), N, h, w, height, width};
}

}  // namespace dmm
