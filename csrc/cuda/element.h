// The types that a CUDA kernel of a vision op is compiled for.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace dmm {

// f(tag of the element type, tag of the type to compute in)
template <typename F>
void for_type(torch::headeronly::ScalarType type, const F& f) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Half:
      return f(c10::Half{}, float{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{}, float{});
    default:
      return f(float{}, float{});
  }
}

}  // namespace dmm
