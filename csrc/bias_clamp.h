// What follows a convolution: a bias, what is added, and an activation that is a clamp, in one pass.
// What every backend is given, and the checks none of them can be entered without.
#pragma once

#include "check.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace dmm {

inline constexpr const char* kBiasClampSchema =
    "bias_clamp(Tensor x, Tensor bias, Tensor? residual, float low, float high) -> Tensor";

// Checked inputs, x and residual dense and laid out alike: contiguous or channels-last. Either may be one image for all of the
// other.
struct BiasClampInputs {
  Tensor x, bias;  // [N, C, H, W], [C]
  std::optional<Tensor> residual;
  int64_t numel, C, inner;  // of the result; its element i has channel i / inner % C
  int64_t taken, added;     // elements of x and of the residual, taken again from the first on
  double low, high;

  Tensor new_result() const { return torch::stable::empty_like(numel == taken ? x : *residual); }
  const void* residual_data() const { return residual ? residual->data_ptr() : nullptr; }
};

inline BiasClampInputs check_bias_clamp(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, double low,
                                        double high) {
  using torch::headeronly::MemoryFormat;
  constexpr const char* op = "dmm::bias_clamp";
  DMM_CHECK(x.dim() == 4, op, ": x must have shape [N, C, H, W], got ", shape_of(x));
  const int64_t C = x.size(1);
  DMM_CHECK(bias.dim() == 1 && bias.size(0) == C, op, ": bias must have shape [C] with C = ", C, ", got ", shape_of(bias));
  const ScalarType type = x.scalar_type();
  DMM_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16,
            op, ": x must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(type));
  check_dtype(op, "bias", bias, type);
  check_same_device(op, "bias", bias, "x", x);
  DMM_CHECK(low <= high, op, ": low must be at most high, got ", low, " and ", high);
  if (residual) {
    const Tensor& r = *residual;
    const bool fits = r.dim() == 4 && (r.size(0) == x.size(0) || r.size(0) == 1 || x.size(0) == 1) && r.size(1) == C &&
                      r.size(2) == x.size(2) && r.size(3) == x.size(3);
    DMM_CHECK(fits, op, ": residual must have the shape of x, ", shape_of(x), ", or one of the two a single image, got ",
              shape_of(r));
    check_dtype(op, "residual", r, type);
    check_same_device(op, "residual", r, "x", x);
  }
  const int64_t plane = x.size(2) * x.size(3);
  int64_t dense = 1;
  bool last = !x.is_contiguous();
  for (int64_t dim : {1, 3, 2, 0}) {  // as torch has it: a dimension of size 1 may have any stride
    if (x.size(dim) != 1) last = last && x.stride(dim) == dense;
    dense *= x.size(dim);
  }
  const MemoryFormat format = last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  BiasClampInputs in{torch::stable::contiguous(x, format),
                     torch::stable::contiguous(bias),
                     std::nullopt,
                     x.numel(),
                     C,
                     last ? 1 : plane,
                     x.numel(),
                     x.numel(),
                     low,
                     high};
  if (residual) {
    in.residual = torch::stable::contiguous(*residual, format);
    in.added = residual->numel();
    if (x.size(0) == 1) in.numel = in.added;
  }
  return in;
}

}  // namespace dmm
