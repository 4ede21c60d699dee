// The launchers of csrc/cuda/{mask_iou,paste_combine}.cuh on the emulated device, for ctypes.
#include <cuda_runtime.h>

#include "../../csrc/cuda/mask_iou.cuh"
#include "../../csrc/cuda/paste_combine.cuh"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

namespace dmm::paste {
alignas(16) thread_local unsigned char shared_memory[1 << 16];
}

namespace {

template <typename T, typename C>
void paste(const void* assignment, const void* masks, const void* boxes, const int64_t* sizes, const void* grad, void* out,
           void* grad_assignment, void* grad_masks) {
  const auto [N, M, S, H, W] = std::array{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const dmm::paste::Problem<T, C> p{static_cast<const T*>(assignment),
                                    static_cast<const T*>(masks),
                                    static_cast<const C*>(boxes),
                                    N,
                                    M,
                                    static_cast<int>(S),
                                    static_cast<int>(H),
                                    static_cast<int>(W)};
  std::memset(dmm::paste::shared_memory, 0xff, sizeof(dmm::paste::shared_memory));
  if (N * H * W > 0) dmm::paste::forward("paste_combine", p, static_cast<T*>(out), nullptr);
  std::vector<C> parts(M * S * N, static_cast<C>(NAN));
  dmm::paste::backward("paste_combine_backward", p, static_cast<const T*>(grad), parts.data(), static_cast<T*>(grad_assignment),
                       static_cast<T*>(grad_masks), nullptr);
}

}  // namespace

extern "C" {

void mask_iou(const uint8_t* a, const uint8_t* b, const int64_t* sizes, float* iou) {
  dmm::iou::Problem p{a, b, iou, nullptr, sizes[0], sizes[1], sizes[2], sizes[3]};
  std::vector<dmm::iou::TileCounts> tiles(p.tile_count());
  std::memset(static_cast<void*>(tiles.data()), 0xff, tiles.size() * sizeof(tiles[0]));
  p.tiles = tiles.data();
  dmm::iou::mask_iou("mask_iou", p, nullptr);
}

// sizes: N, M, S, H, W. element: 0 float32, 1 float64, 2 float16, 3 bfloat16.
void paste_combine(const void* assignment, const void* masks, const void* boxes, const int64_t* sizes, int element,
                   const void* grad, void* out, void* grad_assignment, void* grad_masks) {
  const auto run = element == 0   ? paste<float, float>
                   : element == 1 ? paste<double, double>
                   : element == 2 ? paste<c10::Half, float>
                                  : paste<c10::BFloat16, float>;
  run(assignment, masks, boxes, sizes, grad, out, grad_assignment, grad_masks);
}
}
