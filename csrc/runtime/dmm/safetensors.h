// The safetensors format: eight bytes of length, a JSON header, the tensors' bytes one after the other.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dmm {

struct TensorBytes {
  std::string dtype;  // "BOOL", "U8", "I64", "F16", "BF16", "F32" or "F64"
  std::vector<int64_t> shape;
  std::string_view bytes;  // row-major
};

using Metadata = std::map<std::string, std::string>;

/// A file in memory. `tensors` looks into it, so it moves but is not copied.
class SafeTensors {
 public:
  /// Throws Error for everything that is not a whole file of the format.
  static SafeTensors read(const std::string& path);

  SafeTensors(SafeTensors&&) = default;
  SafeTensors& operator=(SafeTensors&&) = default;

  Metadata metadata;
  std::map<std::string, TensorBytes> tensors;

 private:
  SafeTensors() = default;
  std::vector<char> data_;  // unlike a string's, its bytes stay where they are when it is moved
};

/// Bytes of one element; 0 for a dtype that is not among those above.
int64_t element_bytes(std::string_view dtype);

void write_safetensors(const std::string& path, const Metadata& metadata,
                       const std::vector<std::pair<std::string, TensorBytes>>& tensors);

}  // namespace dmm
