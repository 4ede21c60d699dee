// Checks that every op of this library runs before its kernel, and the words they fail with:
// "dmm::match: cost must have shape [B, N, M] or [N, M], got [4]".
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dmm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Words>
[[noreturn]] inline void fail(const Words&... words) {
  std::ostringstream message;
  (message << ... << words);
  throw std::runtime_error(message.str());
}

// torch's own check macro puts the source path of the build machine into the message; this one does not.
#define DMM_CHECK(condition, ...)                                    \
  do {                                                               \
    if (__builtin_expect(!(condition), 0)) ::dmm::fail(__VA_ARGS__); \
  } while (false)

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other,
                              const Tensor& reference) {
  DMM_CHECK(same_device(tensor, reference), op, ": ", name, " must be on the device of ", other);
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected) {
  DMM_CHECK(tensor.scalar_type() == expected, op, ": ", name, " must be ", torch::headeronly::toString(expected), ", got ",
            torch::headeronly::toString(tensor.scalar_type()));
}

}  // namespace dmm
