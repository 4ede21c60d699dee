#include "dmm/frames.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>

#include "dmm/error.h"

namespace dmm {
namespace {

namespace fs = std::filesystem;

constexpr std::array<std::string_view, 3> kRead = {".jpg", ".jpeg", ".png"};
constexpr std::array<std::string_view, 5> kOther = {".bmp", ".webp", ".tif", ".tiff", ".ppm"};

bool digit(char c) { return c >= '0' && c <= '9'; }

/// The run of digits, or of anything else, that begins at `at`, which is moved behind it.
std::string_view part(std::string_view text, size_t& at) {
  const size_t begin = at;
  while (at < text.size() && digit(text[at]) == digit(text[begin])) ++at;
  return text.substr(begin, at - begin);
}

/// Whether name `a` comes before `b`: numbers by value and before words.
bool before(std::string_view a, std::string_view b) {
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    const bool number = digit(a[i]);
    if (number != digit(b[j])) return number;
    std::string_view mine = part(a, i), theirs = part(b, j);
    if (number) {
      mine.remove_prefix(std::min(mine.find_first_not_of('0'), mine.size()));
      theirs.remove_prefix(std::min(theirs.find_first_not_of('0'), theirs.size()));
      if (mine.size() != theirs.size()) return mine.size() < theirs.size();
    }
    if (mine != theirs) return mine < theirs;
  }
  return a.size() != b.size() ? a.size() < b.size() : a < b;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> list_frames(const std::string& folder) {
  if (!fs::is_directory(folder)) fail(folder, ": no such folder of frames");
  std::vector<std::pair<std::string, std::string>> frames;
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::string suffix = entry.path().extension().string();
    for (char& c : suffix) c = c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c;
    if (entry.path().filename().string()[0] == '.') continue;
    if (std::count(kOther.begin(), kOther.end(), suffix))
      fail(entry.path().string(), ": frames are read as JPEG and PNG here, not as ", suffix);
    if (std::count(kRead.begin(), kRead.end(), suffix))
      frames.emplace_back(entry.path().stem().string(), entry.path().string());
  }
  if (frames.empty()) fail(folder, ": no images (jpg, jpeg, png) here");
  std::sort(frames.begin(), frames.end(), [](const auto& a, const auto& b) { return before(a.first, b.first); });
  for (size_t k = 1; k < frames.size(); ++k) {
    if (frames[k].first == frames[k - 1].first)
      fail(frames[k - 1].second, " and ", frames[k].second, " are the same frame twice");
  }
  return frames;
}

}  // namespace dmm
