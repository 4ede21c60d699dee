// dmm::bias_clamp on CUDA tensors: the current stream, one launch, no wait for the device.
#include "../bias_clamp.h"
#include "bias_clamp.cuh"
#include "current_stream.h"
#include "element.h"

namespace dmm {
namespace {

Tensor bias_clamp(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual, double low, double high) {
  constexpr const char* op = "dmm::bias_clamp";
  const BiasClampInputs in = check_bias_clamp(x, bias, residual, low, high);
  DMM_CHECK(in.numel < int64_t{1} << 31, op, ": the result must have fewer than 2^31 elements on CUDA, got ", in.numel);
  const CurrentStream current(x);
  Tensor out = in.new_result();
  if (in.numel == 0) return out;
  for_type(x.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const finish::Problem<T, C> p{static_cast<const T*>(in.x.data_ptr()),
                                  static_cast<const T*>(in.bias.data_ptr()),
                                  static_cast<const T*>(in.residual_data()),
                                  static_cast<unsigned>(in.numel),
                                  static_cast<unsigned>(in.C),
                                  static_cast<unsigned>(in.inner),
                                  static_cast<unsigned>(in.taken),
                                  static_cast<unsigned>(in.added),
                                  static_cast<C>(in.low),
                                  static_cast<C>(in.high)};
    finish::bias_clamp(op, p, static_cast<T*>(out.data_ptr()), current.stream);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dmm, CUDA, m) { m.impl("bias_clamp", TORCH_BOX(&bias_clamp)); }

}  // namespace dmm
