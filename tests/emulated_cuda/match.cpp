// The launchers of csrc/cuda/match_launch.cuh on the emulated device, for ctypes.
#include <cuda_runtime.h>

#include "../../csrc/cuda/match_launch.cuh"

#include <cstdlib>
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

dmm::cuda::Problem problem(const void* cost, const void* init, const int64_t* num_templates,
                           const int64_t* num_proposals, const void* lr, int64_t lr_stride, const int64_t* sizes,
                           double lr_value, int carry, int last, int element) {
  const dmm::MatchOptions options{sizes[3], sizes[4], lr_value, carry != 0, last != 0};
  return {{cost, init, num_templates, num_proposals, lr, lr_stride, sizes[0], sizes[1], sizes[2], options},
          static_cast<dmm::cuda::Element>(element),
          dmm::output_scale(options)};
}

}  // namespace

extern "C" {

void set_device(int processors, int shared_bytes, int last_thread_first) {
  emulated::device = {processors, shared_bytes, last_thread_first != 0};
}

// sizes: B, N, M, n_grad, n_proj
void match(const void* cost, const void* init, const int64_t* num_templates, const int64_t* num_proposals,
           const void* lr, int64_t lr_stride, const int64_t* sizes, double lr_value, int carry, int last, int element,
           void* out) {
  std::memset(dmm::cuda::shared_memory, 0xff, sizeof(dmm::cuda::shared_memory));
  dmm::cuda::forward(
      problem(cost, init, num_templates, num_proposals, lr, lr_stride, sizes, lr_value, carry, last, element), out,
      nullptr, Scratch());
}

void match_backward(const void* cost, const void* init, const int64_t* num_templates, const int64_t* num_proposals,
                    const void* lr, int64_t lr_stride, const int64_t* sizes, double lr_value, int carry, int last,
                    int element, const void* grad, void* grad_cost, void* grad_init, void* grad_lr) {
  std::memset(dmm::cuda::shared_memory, 0xff, sizeof(dmm::cuda::shared_memory));
  dmm::cuda::backward(
      problem(cost, init, num_templates, num_proposals, lr, lr_stride, sizes, lr_value, carry, last, element),
      {grad, grad_cost, grad_init, grad_lr}, nullptr, Scratch());
}
}
