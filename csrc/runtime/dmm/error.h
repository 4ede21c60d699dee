// Error messages, and reading whole files.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dmm {

/// Something from outside cannot be used; what() names it, the rule and the value.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

/// A text from outside for a message: in quotes, at most 60 bytes of it, nothing that is not printable.
std::string excerpt(std::string_view text);

/// The bytes of a file of at most `limit` bytes.
std::string read_file(const std::string& path, uint64_t limit = uint64_t(4) << 30);

/// Write a file whole or not at all: into a neighbour first, which then takes its name.
void write_file(const std::string& path, std::string_view bytes);

}  // namespace dmm
