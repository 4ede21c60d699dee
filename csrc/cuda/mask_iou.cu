// dmm::mask_iou on CUDA tensors: the current stream, one launch (and one memset), no wait for the device.
#include "../mask_iou.h"
#include "current_stream.h"
#include "mask_iou.cuh"

namespace dmm {
namespace {

Tensor mask_iou(const Tensor& a, const Tensor& b) {
  constexpr const char* op = "dmm::mask_iou";
  const MaskIouInputs in = check_mask_iou(a, b);
  const CurrentStream current(a);
  Tensor result = in.new_result();
  if (result.numel() == 0) return result;
  iou::Problem p{in.a_of(0), in.b_of(0), static_cast<float*>(result.data_ptr()), nullptr, in.B, in.N, in.M, in.pixels};
  DMM_CHECK(p.blocks() < (int64_t{1} << 31), op, ": too many masks for one call, got ", shape_of(a), " and ", shape_of(b));
  const Tensor scratch =
      torch::stable::new_empty(a, {p.tile_count() * static_cast<int64_t>(sizeof(iou::TileCounts))}, ScalarType::Byte);
  p.tiles = static_cast<iou::TileCounts*>(scratch.data_ptr());
  iou::mask_iou(op, p, current.stream);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) { m.impl("mask_iou", TORCH_BOX(&mask_iou)); }

}  // namespace dmm
