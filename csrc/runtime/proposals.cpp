#include "dmm/proposals.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <numeric>
#include <optional>
#include <set>
#include <string_view>

#include "dmm/error.h"

namespace dmm {
namespace {

constexpr std::array<const char*, 5> kSuffixes = {"jpg", "jpeg", "png", "bmp", "webp"};
constexpr const char* kDigits = "0123456789";

/// Frame stems and image ids meet here: 7, "7" and "00007" name the same frame; so do "a.jpg" and "a".
std::string key(std::string id) {
  if (const auto dot = id.rfind('.'); dot != std::string::npos && dot > 0) {
    std::string suffix = id.substr(dot + 1);
    for (char& c : suffix) c = c >= 'A' && c <= 'Z' ? char(c - 'A' + 'a') : c;
    if (std::find(kSuffixes.begin(), kSuffixes.end(), suffix) != kSuffixes.end()) id.resize(dot);
  }
  const bool digits = !id.empty() && id.find_first_not_of(kDigits) == std::string::npos;
  if (digits) id.erase(0, std::min(id.find_first_not_of('0'), id.size() - 1));
  return id;
}

/// The whole number that a text is, if it is one.
std::optional<int64_t> number(std::string_view text) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto read = std::from_chars(text.data(), end, value);
  return read.ec == std::errc() && read.ptr == end ? std::optional(value) : std::nullopt;
}

/// The last number in a frame's name.
std::optional<int64_t> last_number(std::string_view stem) {
  const size_t last = stem.find_last_of(kDigits);
  if (last == stem.npos) return std::nullopt;
  const size_t begin = stem.find_last_not_of(kDigits, last) + 1;  // npos + 1 = 0
  return number(stem.substr(begin, last + 1 - begin));
}

/// At most six names for a message, and the last.
std::string listed(const std::vector<std::string>& names) {
  const auto plain = [](const std::string& name) {
    const std::string quoted = excerpt(name);
    return quoted.substr(1, quoted.size() - 2);
  };
  std::string result;
  for (size_t k = 0; k < std::min<size_t>(names.size(), 6); ++k) result += (k ? ", " : "") + plain(names[k]);
  return result + (names.size() > 6 ? ", ... " + plain(names.back()) : "");
}

bool image_id(const Json* id, std::string& result) {
  if (!id) return false;
  if (const auto* text = id->get<std::string>()) {
    result = key(*text);
  } else if (const auto* number = id->get<int64_t>()) {
    result = key(std::to_string(*number));
  } else {
    return false;
  }
  return true;
}

int side(const Json::Array& size, size_t index) {
  const auto* value = size[index].get<int64_t>();
  return value && *value > 0 && *value < 1 << 16 ? int(*value) : 0;
}

/// The run lengths of an RLE's `counts`; false where they are none.
bool run_lengths(const Json* counts, std::vector<int64_t>& runs) {
  if (!counts) return false;
  if (const auto* text = counts->get<std::string>()) return uncompress(*text, runs);
  const auto* list = counts->get<Json::Array>();
  if (!list) return false;
  for (const Json& item : *list) {
    const auto* run = item.get<int64_t>();
    if (!run) return false;
    runs.push_back(*run);
  }
  return true;
}

/// Whether runs are none of them negative and fill a mask of `area` pixels.
bool fill(const std::vector<int64_t>& runs, int64_t area) {
  for (int64_t run : runs) {
    if (run < 0 || run > area) return false;
    area -= run;
  }
  return area == 0;
}

/// A segmentation's run lengths, of 0 and 1 in turn, down the columns.
std::vector<int64_t> decode(const Json& segmentation, int height, int width, const std::string& where) {
  if (segmentation.get<Json::Array>()) {
    fail(where, ": polygons are not read here; convert them to RLE (pycocotools.mask.frPyObjects)");
  }
  const Json* member = segmentation.find("size");
  const auto* size = member ? member->get<Json::Array>() : nullptr;
  if (!size || size->size() != 2 || !side(*size, 0) || !side(*size, 1)) {
    fail(where, ": needs a segmentation {size: [H, W], counts}, got ", excerpt(segmentation.dump()));
  }
  if (side(*size, 0) != height || side(*size, 1) != width) {
    fail(where, ": masks are ", side(*size, 1), "x", side(*size, 0), ", the frames are ", width, "x", height);
  }
  std::vector<int64_t> runs;
  if (!run_lengths(segmentation.find("counts"), runs) || !fill(runs, int64_t(height) * width)) {
    fail(where, ": the run lengths do not fill a ", width, "x", height, " mask; the file is damaged");
  }
  return runs;
}

/// The tight box of the ones.
std::array<int, 4> tight_box(const std::vector<int64_t>& runs, int height, int width) {
  std::array<int, 4> box = {width, height, 0, 0};
  int64_t at = 0;
  for (size_t k = 0; k < runs.size(); at += runs[k++]) {
    if (k % 2 == 0 || runs[k] == 0) continue;
    const int64_t last = at + runs[k] - 1;
    const bool one = at / height == last / height;  // column; else the run goes over the bottom and on from the top
    box = {std::min(box[0], int(at / height)), std::min(box[1], one ? int(at % height) : 0),
           std::max(box[2], int(last / height) + 1), std::max(box[3], one ? int(last % height) + 1 : height)};
  }
  return box[2] > 0 ? box : std::array<int, 4>{};
}

/// The box of an entry: its bbox [x, y, width, height] where given, else that of its mask.
std::array<float, 4> box_of(const Json& bbox, const std::array<int, 4>& tight, const std::string& where) {
  if (bbox.get<std::monostate>()) return {float(tight[0]), float(tight[1]), float(tight[2]), float(tight[3])};
  const auto* list = bbox.get<Json::Array>();
  double x, y, w, h;
  if (!list || list->size() != 4 || !(*list)[0].number(x) || !(*list)[1].number(y) || !(*list)[2].number(w) ||
      !(*list)[3].number(h)) {
    fail(where, ": bbox must be [x, y, width, height], got ", excerpt(bbox.dump()));
  }
  return {float(x), float(y), float(x + w), float(y + h)};
}

}  // namespace

bool uncompress(const std::string& counts, std::vector<int64_t>& runs) {
  // Five bits a character, low bits first; bit 5 says that more follow, the last character's bit 4 is the sign. From the fourth
  // run on, each is stored less the run two before it.
  for (size_t at = 0; at < counts.size();) {
    int64_t run = 0;
    for (int shift = 0;; shift += 5) {
      const int code = at < counts.size() ? static_cast<unsigned char>(counts[at++]) - 48 : -1;
      if (code < 0 || code > 63 || shift > 30) return false;
      run |= int64_t(code & 31) << shift;
      if (code & 32) continue;
      if (code & 16) run -= int64_t(32) << shift;
      break;
    }
    if (runs.size() > 2) run += runs[runs.size() - 2];
    if (run < 0 || run > int64_t(1) << 32) return false;  // no mask is that large; a sum of such cannot overflow
    runs.push_back(run);
  }
  return !runs.empty();
}

ProposalFile::ProposalFile(const std::string& path, int top) : path_(path), top_(top) {
  const Json results = Json::parse(read_file(path), path);
  if (results.find("annotations")) {
    fail(path, ": a COCO data set with 'annotations'; proposals are a COCO results list with scores");
  }
  const auto* list = results.get<Json::Array>();
  if (!list) fail(path, ": a COCO results file is a JSON list");
  for (size_t index = 0; index < list->size(); ++index) {
    const Json& item = (*list)[index];
    std::string id;
    const Json* score = item.find("score");
    Entry entry{};
    if (!image_id(item.find("image_id"), id) || !score || !score->number(entry.score)) {
      fail(path, ": entry ", index, " needs image_id and a finite score, got ", excerpt(item.dump()));
    }
    if (const Json* bbox = item.find("bbox")) entry.bbox = *bbox;
    if (const Json* segmentation = item.find("segmentation")) entry.segmentation = *segmentation;
    auto& entries = entries_[id];
    if (entries.empty()) ids_.push_back(id);
    entries.push_back(std::move(entry));
  }
  for (auto& [id, entries] : entries_) {
    std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.score > b.score; });
  }
}

FrameProposals ProposalFile::frame(const std::string& stem, int height, int width) const {
  FrameProposals result{height, width, {}, {}, {}};
  const auto found = find(stem);
  if (found == entries_.end()) return result;
  const size_t count = std::min(found->second.size(), size_t(top_));
  std::vector<std::vector<int64_t>> codes;
  size_t longest = 1;
  for (size_t index = 0; index < count; ++index) {
    const Entry& entry = found->second[index];
    const std::string where = path_ + ", image_id " + excerpt(found->first);
    codes.push_back(decode(entry.segmentation, height, width, where));
    longest = std::max(longest, codes.back().size());
    const auto box = box_of(entry.bbox, tight_box(codes.back(), height, width), where);
    result.boxes.insert(result.boxes.end(), box.begin(), box.end());
    result.scores.push_back(float(entry.score));
  }
  result.runs.resize(count * longest, kNoRun);
  for (size_t index = 0; index < count; ++index) {
    std::partial_sum(codes[index].begin(), codes[index].end(), result.runs.begin() + int64_t(index * longest));
  }
  return result;
}

ProposalFile::Entries::const_iterator ProposalFile::find(const std::string& stem) const {
  if (moved_.empty()) return entries_.find(key(stem));
  const auto moved = moved_.find(key(stem));
  return moved == moved_.end() ? entries_.end() : entries_.find(moved->second);
}

void ProposalFile::shift(const std::vector<std::string>& stems, int64_t offset) {
  asked_ = true;
  if (empty() || (offset == 0 && covers(stems))) return;
  std::vector<int64_t> places;
  for (const std::string& stem : stems) {
    if (const auto place = last_number(stem)) places.push_back(*place);
  }
  if (std::set<int64_t>(places.begin(), places.end()).size() < stems.size()) {
    places.resize(stems.size());
    std::iota(places.begin(), places.end(), 0);
  }
  std::map<int64_t, std::string> numbered;
  for (const std::string& id : ids_) {
    if (const auto value = number(id)) numbered[*value] = id;
  }
  for (size_t k = 0; k < stems.size(); ++k) {
    int64_t wanted = 0;
    if (__builtin_sub_overflow(places[k], offset, &wanted)) continue;
    if (const auto found = numbered.find(wanted); found != numbered.end()) moved_[key(stems[k])] = found->second;
  }
  if (moved_.empty()) fail(path_, ": with --image-id-offset ", offset, " no image id is that of a frame");
}

std::vector<std::string> ProposalFile::notes(const std::vector<std::string>& stems) const {
  std::vector<std::string> empty, stray, told;
  std::set<std::string> used;
  for (const std::string& stem : stems) {
    const auto found = find(stem);
    found == entries_.end() ? empty.push_back(stem) : void(used.insert(found->first));
  }
  std::vector<int64_t> numbers;
  for (const std::string& id : ids_) {
    if (!used.count(id)) stray.push_back(id);
    if (const auto value = number(id)) numbers.push_back(*value);
  }
  const std::string name = std::filesystem::path(path_).filename().string() + ": ";
  const auto count = [](size_t part, size_t all) { return std::to_string(part) + " of " + std::to_string(all); };
  if (!empty.empty())
    told.push_back(name + "no proposals for " + count(empty.size(), stems.size()) + " frames: " + listed(empty));
  if (!stray.empty())
    told.push_back(name + count(stray.size(), ids_.size()) + " image ids are not those of a frame: " + listed(stray));
  // Exporters often count from 1; text ids are names, which do not count.
  if (!asked_ && !empty.empty() && !numbers.empty() && numbers.size() == ids_.size()) {
    const bool from_one =
        *std::min_element(numbers.begin(), numbers.end()) == 1 && empty[0] == stems[0] && last_number(stems[0]) == 0;
    if (!stray.empty() || from_one) {
      told.push_back(name +
                     "do the ids count from another number? dmm-fast segment detects that, or give --image-id-offset N, "
                     "which is added to them (0: they are right)");
    }
  }
  return told;
}

int64_t ProposalFile::covers(const std::vector<std::string>& stems) const {
  return std::count_if(stems.begin(), stems.end(), [this](const std::string& stem) { return find(stem) != entries_.end(); });
}

std::string ProposalFile::example() const { return ids_.empty() ? "nothing" : excerpt(ids_[0]); }

}  // namespace dmm
