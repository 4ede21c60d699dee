// dmm::upsample_argmax on CUDA tensors: the current stream, one launch, no wait for the device.
#include "../upsample_argmax.h"
#include "current_stream.h"
#include "element.h"
#include "upsample_argmax.cuh"

#include <torch/csrc/stable/ops.h>

namespace dmm {
namespace {

Tensor upsample_argmax(const Tensor& logits, const Tensor& rank, int64_t height, int64_t width) {
  constexpr const char* op = "dmm::upsample_argmax";
  const UpsampleInputs in = check_upsample_argmax(logits, rank, height, width);
  const CurrentStream current(logits);
  Tensor labels = in.new_result();
  if (labels.numel() == 0) return labels;
  constexpr int64_t limit = int64_t{65535} * grid::kLabelWarps * grid::kLabelRows;
  DMM_CHECK(height <= limit, op, ": height must be at most ", limit, " on CUDA, got ", height);
  for_type(logits.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    const grid::LabelProblem<T, decltype(c)> p{static_cast<const T*>(in.logits.data_ptr()),
                                               static_cast<const int64_t*>(in.rank.data_ptr()),
                                               static_cast<int>(in.N),
                                               static_cast<int>(in.h),
                                               static_cast<int>(in.w),
                                               static_cast<int>(in.H),
                                               static_cast<int>(in.W)};
    grid::upsample_argmax(op, p, static_cast<uint8_t*>(labels.data_ptr()), current.stream);
  });
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) { m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax)); }

}  // namespace dmm
