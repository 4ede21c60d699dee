// The launchers of the vision ops (csrc/cuda/*.cuh) on the emulated device, for ctypes.
#include <cuda_runtime.h>

#include "../../csrc/cuda/bias_clamp.cuh"
#include "../../csrc/cuda/decode_runs.cuh"
#include "../../csrc/cuda/mask_iou.cuh"
#include "../../csrc/cuda/paste_combine.cuh"
#include "../../csrc/cuda/paste_masks.cuh"
#include "../../csrc/cuda/upsample_argmax.cuh"

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

template <typename T, typename C>
void cover_of(const void* masks, const void* boxes, const int64_t* sizes, void* cover) {
  const auto [M, S, rows, columns, samples] = std::array{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const dmm::grid::PasteProblem<T, C> p{static_cast<const T*>(masks), static_cast<const C*>(boxes), M,
                                        static_cast<int>(S),          static_cast<int>(rows),       static_cast<int>(columns),
                                        static_cast<int>(samples)};
  dmm::grid::paste_masks("paste_masks", p, static_cast<T*>(cover), nullptr);
}

template <typename T, typename C>
void labels_of(const void* logits, const int64_t* rank, const int64_t* sizes, uint8_t* labels) {
  const auto [N, h, w, H, W] = std::array{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const dmm::grid::LabelProblem<T, C> p{static_cast<const T*>(logits),
                                        rank,
                                        static_cast<int>(N),
                                        static_cast<int>(h),
                                        static_cast<int>(w),
                                        static_cast<int>(H),
                                        static_cast<int>(W)};
  dmm::grid::upsample_argmax("upsample_argmax", p, labels, nullptr);
}

template <typename T, typename C>
void finished(const void* x, const void* bias, const void* residual, const int64_t* sizes, const double* limits, void* out) {
  const dmm::finish::Problem<T, C> p{static_cast<const T*>(x),        static_cast<const T*>(bias),
                                     static_cast<const T*>(residual), static_cast<unsigned>(sizes[0]),
                                     static_cast<unsigned>(sizes[1]), static_cast<unsigned>(sizes[2]),
                                     static_cast<unsigned>(sizes[3]), static_cast<unsigned>(sizes[4]),
                                     static_cast<C>(limits[0]),       static_cast<C>(limits[1])};
  dmm::finish::bias_clamp("bias_clamp", p, static_cast<T*>(out), nullptr);
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

// sizes: M, S, rows, columns, samples.
void paste_masks(const void* masks, const void* boxes, const int64_t* sizes, int element, void* cover) {
  const auto run = element == 0   ? cover_of<float, float>
                   : element == 1 ? cover_of<double, double>
                   : element == 2 ? cover_of<c10::Half, float>
                                  : cover_of<c10::BFloat16, float>;
  run(masks, boxes, sizes, cover);
}

// sizes: M, R, height, width, rows, columns.
void decode_runs(const int32_t* runs, const int64_t* sizes, float* share) {
  const dmm::grid::RunsProblem p{runs, sizes[0], static_cast<int>(sizes[1]), {sizes[2], sizes[4]}, {sizes[3], sizes[5]}};
  dmm::grid::decode_runs("decode_runs", p, share, nullptr);
}

// sizes: N, h, w, H, W.
void upsample_argmax(const void* logits, const int64_t* rank, const int64_t* sizes, int element, uint8_t* labels) {
  const auto run = element == 0   ? labels_of<float, float>
                   : element == 1 ? labels_of<double, double>
                   : element == 2 ? labels_of<c10::Half, float>
                                  : labels_of<c10::BFloat16, float>;
  run(logits, rank, sizes, labels);
}

// sizes: elements of the result, channels, inner, elements of x, of the residual. limits: low, high.
void bias_clamp(const void* x, const void* bias, const void* residual, const int64_t* sizes, const double* limits, int element,
                void* out) {
  const auto run = element == 0   ? finished<float, float>
                   : element == 1 ? finished<double, double>
                   : element == 2 ? finished<c10::Half, float>
                                  : finished<c10::BFloat16, float>;
  run(x, bias, residual, sizes, limits, out);
}
}
