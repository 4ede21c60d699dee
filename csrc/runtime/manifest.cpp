#include "dmm/manifest.h"

#include <algorithm>
#include <filesystem>

#include "dmm/error.h"
#include "dmm/sha256.h"

namespace dmm {
namespace {

constexpr int64_t kFormat = 3;

/// Reads members of one file, with its name before every message.
class Reader {
 public:
  explicit Reader(std::string source) : source_(std::move(source)) {}

  [[noreturn]] void wrong(const std::string& rule, const Json* got) const {
    fail(source_, ": ", rule, ", got ", got ? excerpt(got->dump()) : "nothing");
  }

  template <class T>
  const T& member(const Json& holder, const char* name, const char* kind) const {
    const Json* found = holder.find(name);
    const T* value = found ? found->get<T>() : nullptr;
    if (!value) wrong(std::string("'") + name + "' must be " + kind, found);
    return *value;
  }
  const std::string& text(const Json& holder, const char* name) const { return member<std::string>(holder, name, "a text"); }
  int64_t integer(const Json& holder, const char* name) const { return member<int64_t>(holder, name, "an integer"); }
  const Json::Array& list(const Json& holder, const char* name) const { return member<Json::Array>(holder, name, "a list"); }
  const Json::Object& object(const Json& holder, const char* name) const {
    return member<Json::Object>(holder, name, "an object");
  }

  std::vector<TensorSpec> specs(const Json& holder, const char* name) const {
    static constexpr std::string_view kDtypes[] = {"bool", "uint8", "int32", "int64", "float32"};
    std::vector<TensorSpec> result;
    for (const Json& item : list(holder, name)) {
      TensorSpec spec{text(item, "name"), text(item, "dtype"), {}};
      if (std::find(std::begin(kDtypes), std::end(kDtypes), spec.dtype) == std::end(kDtypes)) {
        wrong("dtype of " + excerpt(spec.name) + " must be bool, uint8, int32, int64 or float32", item.find("dtype"));
      }
      for (const Json& extent : list(item, "shape")) {
        const auto* size = extent.get<int64_t>();
        const auto* symbol = extent.get<std::string>();
        if (!symbol && !(size && *size >= 0)) wrong("shape of " + excerpt(spec.name) + " must hold sizes and names", &extent);
        spec.shape.push_back(symbol ? Extent{-1, *symbol} : Extent{*size, ""});
      }
      result.push_back(std::move(spec));
    }
    return result;
  }

  Function function(const Json& value) const {
    Function result{text(value, "file"), 0, text(value, "sha256"), specs(value, "inputs"), specs(value, "outputs")};
    const int64_t bytes = integer(value, "bytes");
    const bool plain = result.file.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-") ==
                           std::string::npos &&
                       !result.file.empty() && result.file[0] != '.';
    if (!plain) wrong("'file' must be a plain name in the export's own folder", value.find("file"));
    if (bytes < 0) wrong("'bytes' must be >= 0", value.find("bytes"));
    result.bytes = uint64_t(bytes);
    return result;
  }

 private:
  std::string source_;
};

}  // namespace

Manifest Manifest::read(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  if (!std::filesystem::is_regular_file(path)) fail(folder, ": no manifest.json there, so this is no finished export");
  const Json json = Json::parse(read_file(path, 64 << 20), path);
  const Reader reader(path);
  if (!json.get<Json::Object>()) reader.wrong("a manifest is a JSON object", &json);
  if (reader.integer(json, "format") != kFormat) reader.wrong("this program reads format 3", json.find("format"));

  Manifest result;
  result.folder = folder;
  result.kind = reader.text(json, "kind");
  result.torch = reader.text(json, "torch");
  result.device = reader.text(json, "device");
  result.weights = reader.text(json, "weights");
  result.config = reader.object(json, "config");
  const Json library = reader.object(json, "op_library");
  for (const Json& op : reader.list(library, "ops")) {
    if (!op.get<std::string>()) reader.wrong("'ops' must be a list of texts", &op);
    result.ops.push_back(*op.get<std::string>());
  }
  for (const Json& kind : reader.list(json, "proposal_masks")) {
    if (!kind.get<std::string>()) reader.wrong("'proposal_masks' must be a list of texts", &kind);
    result.masks.insert(*kind.get<std::string>());
  }
  for (const Json& size : reader.list(json, "dynamic")) {
    result.dynamic[reader.text(size, "name")] = {reader.integer(size, "min"), reader.integer(size, "max")};
  }
  for (const auto& [name, value] : reader.object(json, "files")) result.files[name] = reader.function(value);

  std::map<std::string, std::pair<uint64_t, std::string>> seen;
  for (const auto& [name, function] : result.files) {
    const auto said = std::pair(function.bytes, function.sha256);
    const auto [entry, first] = seen.emplace(function.file, said);
    if (entry->second != said) fail(path, ": ", function.file, " is listed with two checksums");
    if (!first) continue;
    const std::string file = result.path(function);
    if (!std::filesystem::is_regular_file(file)) fail(file, ": missing, but listed in manifest.json");
    const std::string bytes = read_file(file);
    if (bytes.size() != function.bytes) {
      fail(file, ": ", bytes.size(), " bytes, ", function.bytes, " when it was written: cut short or replaced");
    }
    if (sha256(bytes) != function.sha256) fail(file, ": its sha256 is not the one in manifest.json: damaged or replaced");
  }
  return result;
}

}  // namespace dmm
