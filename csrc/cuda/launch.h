// Where a CUDA op runs: the tensor's device and torch's current stream on it.
#pragma once

#include "../check.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

namespace dmm {

struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// Reports what the launches since the last check came to.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  DMM_CHECK(error == cudaSuccess, op, ": CUDA: ", cudaGetErrorString(error));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dmm
