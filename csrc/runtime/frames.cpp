#include "dmm/frames.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <string_view>
#include <tuple>

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

/// What a name is sorted by, as natural_key of dmm_fast/data/video.py: its parts, numbers by value and before words, then all
/// of it. A part is whether it is a word, how many digits a number has without leading zeros, and the text.
std::vector<std::tuple<bool, size_t, std::string_view>> natural_key(std::string_view name) {
  std::vector<std::tuple<bool, size_t, std::string_view>> key;
  for (size_t at = 0; at < name.size();) {
    const bool number = digit(name[at]);
    std::string_view text = part(name, at);
    if (number) text.remove_prefix(std::min(text.find_first_not_of('0'), text.size()));
    key.emplace_back(!number, number ? text.size() : 0, text);
  }
  key.emplace_back(true, 0, name);
  return key;
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
  std::sort(frames.begin(), frames.end(),
            [](const auto& a, const auto& b) { return natural_key(a.first) < natural_key(b.first); });
  for (size_t k = 1; k < frames.size(); ++k) {
    if (frames[k].first == frames[k - 1].first)
      fail(frames[k - 1].second, " and ", frames[k].second, " are the same frame twice");
  }
  return frames;
}

}  // namespace dmm
