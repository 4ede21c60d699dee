// From torch's tensors to what the matching launchers take.
#pragma once

#include "../match.h"
#include "problem.cuh"

namespace dmm::cuda {

inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Element::f64;
    case ScalarType::Half:
      return Element::f16;
    case ScalarType::BFloat16:
      return Element::bf16;
    default:
      return Element::f32;
  }
}

inline Problem problem_on_device(const MatchInputs& in) {
  return {problem_of<void>(in), element_of(in.cost), output_scale(in.options)};
}

// Scratch from torch's caching allocator: valid for work queued on the current stream even after the tensor is gone.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}
  void* operator()(int64_t bytes) const {
    memory_ = torch::stable::new_empty(like_, {bytes}, ScalarType::Byte);
    return memory_->data_ptr();
  }

 private:
  const Tensor& like_;
  mutable std::optional<Tensor> memory_;
};

}  // namespace dmm::cuda
