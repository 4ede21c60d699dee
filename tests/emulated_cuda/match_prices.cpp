// The launchers of csrc/cuda/match_prices_launch.cuh on the emulated device, for ctypes.
#include <cuda_runtime.h>

#include "../../csrc/cuda/match_prices_launch.cuh"

#include <vector>

namespace dmm::cuda {
alignas(16) thread_local unsigned char shared_memory[1 << 20];
}

namespace {

// Scratch full of NaN, freed with the call: kernels must write what they read.
struct Scratch {
  mutable std::vector<std::vector<unsigned char>> blocks;
  void* operator()(int64_t bytes) const {
    blocks.emplace_back(bytes, 0xff);
    return blocks.back().data();
  }
};

dmm::cuda::Problem problem(const void* cost, const int64_t* num_templates, const int64_t* num_proposals, const void* lr,
                           int64_t lr_stride, const int64_t* sizes, double lr_value, int last, int element) {
  std::memset(dmm::cuda::shared_memory, 0xff, sizeof(dmm::cuda::shared_memory));
  const dmm::MatchOptions options{sizes[3], sizes[4], lr_value, /*carry=*/false, last != 0};
  return {{cost, nullptr, num_templates, num_proposals, lr, lr_stride, sizes[0], sizes[1], sizes[2], options},
          static_cast<dmm::cuda::Element>(element),
          dmm::output_scale(options)};
}

}  // namespace

extern "C" {

void set_device(int processors, int shared_bytes, int last_thread_first) {
  emulated::device = {processors, shared_bytes, last_thread_first != 0};
}

// sizes: B, N, M, n_grad, n_proj
void match_prices(const void* cost, const int64_t* num_templates, const int64_t* num_proposals, const void* lr,
                  int64_t lr_stride, const int64_t* sizes, double lr_value, int last, int element, void* out) {
  dmm::cuda::prices::forward(
      problem(cost, num_templates, num_proposals, lr, lr_stride, sizes, lr_value, last, element), out, nullptr,
      Scratch());
}

void match_prices_backward(const void* cost, const int64_t* num_templates, const int64_t* num_proposals,
                           const void* lr, int64_t lr_stride, const int64_t* sizes, double lr_value, int last,
                           int element, const void* grad, void* grad_cost, void* grad_lr) {
  dmm::cuda::prices::backward(
      problem(cost, num_templates, num_proposals, lr, lr_stride, sizes, lr_value, last, element),
      {grad, grad_cost, grad_lr}, nullptr, Scratch());
}
}
