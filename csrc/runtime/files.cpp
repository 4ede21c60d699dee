#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "dmm/error.h"

namespace dmm {
namespace {

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

}  // namespace

std::string excerpt(std::string_view text) {
  std::string result = "'";
  for (char c : text.substr(0, 60)) result += c >= ' ' && c < 127 ? c : '?';
  return result + (text.size() > 60 ? "..'" : "'");
}

std::string read_file(const std::string& path, uint64_t limit) {
  std::error_code none;
  if (std::filesystem::is_directory(path, none)) fail(path, ": is a directory, not a file");
  File file(std::fopen(path.c_str(), "rb"));
  if (!file) fail(path, ": ", std::strerror(errno));
  const uint64_t size = std::filesystem::file_size(path, none);  // of a pipe: none, so it is not trusted below
  if (!none && size > limit) fail(path, ": ", size, " bytes; at most ", limit, " are read");
  std::string bytes;
  if (!none) bytes.reserve(size);
  char block[1 << 16];
  for (size_t count = sizeof block; count == sizeof block;) {  // a short count: the end, or an error
    count = std::fread(block, 1, sizeof block, file.get());
    bytes.append(block, count);
    if (bytes.size() > limit) fail(path, ": more than ", limit, " bytes");
  }
  if (std::ferror(file.get())) fail(path, ": cannot be read: ", std::strerror(errno));
  return bytes;
}

void write_file(const std::string& path, std::string_view bytes) {
  const std::string partial = path + "." + std::to_string(getpid()) + ".partial";
  std::FILE* file = std::fopen(partial.c_str(), "wb");
  if (!file) fail(path, ": cannot be written: ", std::strerror(errno));
  const bool written = std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
  if (std::fclose(file) != 0 || !written || std::rename(partial.c_str(), path.c_str()) != 0) {
    const int cause = errno;
    std::remove(partial.c_str());
    fail(path, ": cannot be written: ", std::strerror(cause));
  }
}

}  // namespace dmm
