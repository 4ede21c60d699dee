// A convolution's bias, what is added and its activation on the CPU: a channel's elements, or a pixel's channels, at once.
#include "../bias_clamp.h"
#include "rows.h"

namespace dmm {
namespace {

// Not std::max: NaN stays.
#define DMM_ROW_LOOPS(T)                                                                                                   \
  /* step: 1 for a bias of each element, 0 for the same; residual may be null */                                           \
  DMM_ROW_LOOP void finish(T* out, const T* x, const T* bias, int64_t step, const T* residual, T low, T high, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) {                                                                                      \
      T value = x[i] + bias[i * step];                                                                                     \
      if (residual) value += residual[i];                                                                                  \
      value = value < low ? low : value;                                                                                   \
      out[i] = value > high ? high : value;                                                                                \
    }                                                                                                                      \
  }
DMM_ROW_LOOPS(float)
DMM_ROW_LOOPS(double)
#undef DMM_ROW_LOOPS

template <typename T>
void finish_all(const BiasClampInputs& in, T* out) {
  const auto* x = static_cast<const T*>(in.x.data_ptr());
  const auto* bias = static_cast<const T*>(in.bias.data_ptr());
  const auto* residual = static_cast<const T*>(in.residual_data());
  const int64_t step = in.inner == 1 ? 1 : 0, length = step ? in.C : in.inner;
  torch::stable::parallel_for(0, in.numel / length, 32768 / length + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * length;
      finish(out + at, x + at % in.taken, bias + (step ? 0 : row % in.C), step, residual ? residual + at % in.added : nullptr,
             static_cast<T>(in.low), static_cast<T>(in.high), length);
    }
  });
}

Tensor bias_clamp(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, double low, double high) {
  BiasClampInputs in = check_bias_clamp(x, bias, residual, low, high);
  const ScalarType type = x.scalar_type();
  in.x = to_compute(in.x);
  in.bias = to_compute(in.bias);
  if (in.residual) in.residual = to_compute(*in.residual);
  Tensor out = in.new_result();
  if (in.numel > 0 && type == ScalarType::Double)
    finish_all(in, static_cast<double*>(out.data_ptr()));
  else if (in.numel > 0)
    finish_all(in, static_cast<float*>(out.data_ptr()));
  return is_half(type) ? torch::stable::to(out, type) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dmm, m) { m.def(kBiasClampSchema); }

STABLE_TORCH_LIBRARY_IMPL(dmm, CPU, m) { m.impl("bias_clamp", TORCH_BOX(&bias_clamp)); }

}  // namespace dmm
