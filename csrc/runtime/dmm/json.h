// JSON, as RFC 8259 has it: strict, and safe on hostile text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace dmm {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the text

  Json() = default;
  Json(bool value) : value_(value) {}
  Json(int value) : value_(int64_t(value)) {}
  Json(int64_t value) : value_(value) {}
  Json(double value) : value_(value) {}
  Json(const char* value) : value_(std::string(value)) {}
  Json(std::string value) : value_(std::move(value)) {}
  Json(Array value) : value_(std::move(value)) {}
  Json(Object value) : value_(std::move(value)) {}

  /// `source` stands in front of messages. Throws Error, with line and column.
  static Json parse(std::string_view text, const std::string& source);

  /// On one line, ASCII only, as Python's json.dumps writes it.
  std::string dump() const;

  /// The value if it is a T (std::monostate, bool, int64_t, double, std::string, Array or Object), else nullptr.
  template <class T>
  const T* get() const {
    return std::get_if<T>(&value_);
  }

  /// A finite number of either kind, as a double.
  bool number(double& result) const;

  /// A member of an object; of equal names the last, as in Python. nullptr where there is none, or this is no object.
  const Json* find(std::string_view name) const;

  bool operator==(const Json& other) const;

 private:
  std::variant<std::monostate, bool, int64_t, double, std::string, Array, Object> value_;
};

}  // namespace dmm
