#include "layer.h"

#include "../../csrc/cuda/match_launch.cuh"

extern "C" void forward(const Given* given, void* out) { run_forward<dmm::cuda::Match>(given, out); }

extern "C" void backward(const Given* given, const void* grad, void* grad_cost, void* grad_init, void* grad_lr) {
  run_backward<dmm::cuda::Match>(given, {grad, grad_cost, grad_init, grad_lr});
}
