// What the drivers of the matching layers on the emulated device share, for ctypes.
#pragma once

#include <cuda_runtime.h>

#include "../../csrc/cuda/layer_launch.cuh"

#include <cstring>
#include <vector>

namespace dmm::cuda {
alignas(16) thread_local unsigned char shared_memory[1 << 20];
}

// Scratch full of NaN, freed with the call: kernels must write what they read.
struct Scratch {
  mutable std::vector<std::vector<unsigned char>> blocks;
  void* operator()(int64_t bytes) const {
    blocks.emplace_back(bytes, 0xff);
    return blocks.back().data();
  }
};

// As ctypes hands it over. sizes: B, N, M, n_grad, n_proj.
struct Given {
  const void *cost, *init;
  const int64_t *num_templates, *num_proposals;
  const void *lr, *unmatched;
  int64_t lr_stride, unmatched_stride;
  int64_t sizes[5];
  double lr_value;
  int carry, last, element;

  dmm::cuda::Problem problem() const {
    const dmm::MatchOptions options{sizes[3], sizes[4], lr_value, carry != 0, last != 0};
    return {{cost, init, num_templates, num_proposals, lr, lr_stride, unmatched, unmatched_stride, sizes[0], sizes[1], sizes[2],
             options},
            static_cast<dmm::cuda::Element>(element),
            dmm::output_scale(options)};
  }
};

extern "C" void set_device(int processors, int shared_bytes, int last_thread_first) {
  emulated::device = {processors, shared_bytes, last_thread_first != 0};
}

template <typename Layer>
void run_forward(const Given* given, void* out) {
  std::memset(dmm::cuda::shared_memory, 0xff, sizeof(dmm::cuda::shared_memory));
  dmm::cuda::forward<Layer>(given->problem(), out, nullptr, Scratch());
}

template <typename Layer>
void run_backward(const Given* given, const dmm::cuda::Gradients& gradients) {
  std::memset(dmm::cuda::shared_memory, 0xff, sizeof(dmm::cuda::shared_memory));
  dmm::cuda::backward<Layer>(given->problem(), gradients, nullptr, Scratch());
}
