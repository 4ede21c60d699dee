// Where a CUDA op runs: the tensor's device and torch's current stream on it.
#pragma once

#include "../check.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

namespace dmm {

struct CurrentStream {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit CurrentStream(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

}  // namespace dmm
