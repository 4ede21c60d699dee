// dmm::paste_masks on CUDA tensors: the current stream, one launch, no wait for the device.
#include "../paste_masks.h"
#include "current_stream.h"
#include "element.h"
#include "paste_masks.cuh"

namespace dmm {
namespace {

Tensor paste_masks(const Tensor& masks, const Tensor& boxes, int64_t rows, int64_t columns, int64_t samples) {
  constexpr const char* op = "dmm::paste_masks";
  const PasteMasksInputs in = check_paste_masks(masks, boxes, rows, columns, samples);
  const CurrentStream current(masks);
  Tensor cover = torch::stable::new_empty(in.masks, {in.M, rows, columns});
  if (cover.numel() == 0) return cover;
  constexpr int64_t limit = 65535;
  DMM_CHECK(in.M <= limit && rows <= limit * grid::kWarps * grid::kCells, op, ": M must be at most ", limit,
            " and rows at most ", limit * grid::kWarps * grid::kCells, " on CUDA, got [M, rows, columns] = ", shape_of(cover));
  for_type(masks.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const grid::PasteProblem<T, C> p{static_cast<const T*>(in.masks.data_ptr()),
                                     static_cast<const C*>(in.boxes.data_ptr()),
                                     in.M,
                                     static_cast<int>(in.S),
                                     static_cast<int>(rows),
                                     static_cast<int>(columns),
                                     static_cast<int>(samples)};
    grid::paste_masks(op, p, static_cast<T*>(cover.data_ptr()), current.stream);
  });
  return cover;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) { m.impl("paste_masks", TORCH_BOX(&paste_masks)); }

}  // namespace dmm
