#include "dmm/safetensors.h"

#include <algorithm>
#include <array>

#include "dmm/error.h"
#include "dmm/json.h"

namespace dmm {
namespace {

constexpr uint64_t kHeaderLimit = 100'000'000;  // the format's own

[[noreturn]] void damaged(const std::string& path, const std::string& why) {
  fail(path, " is not a whole safetensors file (", why, ")");
}

/// Bytes that a tensor of this dtype and shape takes.
uint64_t size_of(const TensorBytes& tensor, const std::string& path, const std::string& name) {
  uint64_t size = element_bytes(tensor.dtype);
  if (!size) damaged(path, "dtype of " + excerpt(name) + " is " + excerpt(tensor.dtype));
  for (int64_t extent : tensor.shape) {
    if (extent < 0 || __builtin_mul_overflow(size, uint64_t(extent), &size)) damaged(path, "shape of " + excerpt(name));
  }
  return size;
}

std::vector<int64_t> integers(const Json* json, const std::string& path, const std::string& what) {
  const auto* items = json ? json->get<Json::Array>() : nullptr;
  if (!items) damaged(path, what + " must be a list");
  std::vector<int64_t> result;
  for (const Json& item : *items) {
    const auto* integer = item.get<int64_t>();
    if (!integer || *integer < 0) damaged(path, what + " must hold integers >= 0");
    result.push_back(*integer);
  }
  return result;
}

}  // namespace

int64_t element_bytes(std::string_view dtype) {
  static constexpr std::array<std::pair<std::string_view, int64_t>, 7> kBytes = {
      {{"BOOL", 1}, {"U8", 1}, {"I64", 8}, {"F16", 2}, {"BF16", 2}, {"F32", 4}, {"F64", 8}}};
  for (const auto& [name, bytes] : kBytes) {
    if (name == dtype) return bytes;
  }
  return 0;
}

SafeTensors SafeTensors::read(const std::string& path) {
  const std::string file = read_file(path);
  uint64_t length = 0;
  if (file.size() < 8) damaged(path, "it is shorter than its first eight bytes");
  for (int k = 0; k < 8; ++k) length |= uint64_t(static_cast<unsigned char>(file[k])) << (8 * k);
  if (length > kHeaderLimit || length > file.size() - 8)
    damaged(path, "its header would be " + std::to_string(length) + " bytes");

  SafeTensors result;
  result.data_.assign(file.begin() + 8 + length, file.end());
  const std::string_view data(result.data_.data(), result.data_.size());
  const Json header = Json::parse(std::string_view(file).substr(8, length), path);
  const auto* members = header.get<Json::Object>();
  if (!members) damaged(path, "its header must be an object");

  std::vector<std::pair<uint64_t, uint64_t>> spans;
  for (const auto& [name, value] : *members) {
    if (name == "__metadata__") {
      const auto* entries = value.get<Json::Object>();
      if (!entries) damaged(path, "__metadata__ must be an object");
      for (const auto& [key, entry] : *entries) {
        const auto* text = entry.get<std::string>();
        if (!text) damaged(path, "__metadata__ must hold texts");
        result.metadata[key] = *text;
      }
      continue;
    }
    TensorBytes tensor;
    const Json* dtype = value.find("dtype");
    if (!dtype || !dtype->get<std::string>()) damaged(path, excerpt(name) + " has no dtype");
    tensor.dtype = *dtype->get<std::string>();
    tensor.shape = integers(value.find("shape"), path, "shape of " + excerpt(name));
    const auto span = integers(value.find("data_offsets"), path, "data_offsets of " + excerpt(name));
    if (span.size() != 2 || span[0] > span[1] || uint64_t(span[1]) > data.size()) damaged(path, "place of " + excerpt(name));
    tensor.bytes = data.substr(span[0], span[1] - span[0]);
    if (tensor.bytes.size() != size_of(tensor, path, name)) damaged(path, excerpt(name) + " is not of its shape's size");
    spans.emplace_back(span[0], span[1]);
    if (!result.tensors.emplace(name, std::move(tensor)).second) damaged(path, excerpt(name) + " is there twice");
  }
  std::sort(spans.begin(), spans.end());
  uint64_t end = 0;
  for (const auto& [first, last] : spans) {  // one after the other, without gaps
    if (first != end) damaged(path, "its tensors overlap or leave gaps");
    end = last;
  }
  if (end != data.size()) damaged(path, std::to_string(data.size()) + " bytes where its tensors take " + std::to_string(end));
  return result;
}

void write_safetensors(const std::string& path, const Metadata& metadata,
                       const std::vector<std::pair<std::string, TensorBytes>>& tensors) {
  // Wide elements first, as the format's own writer has it: then each tensor begins at a multiple of its element.
  std::vector<const std::pair<std::string, TensorBytes>*> order;
  order.reserve(tensors.size());
  for (const auto& tensor : tensors) order.push_back(&tensor);
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return element_bytes(a->second.dtype) > element_bytes(b->second.dtype);
  });
  Json::Object texts, header;
  for (const auto& [key, text] : metadata) texts.emplace_back(key, text);
  if (!texts.empty()) header.emplace_back("__metadata__", std::move(texts));
  int64_t begin = 0;
  std::string data;
  for (const auto* entry : order) {
    const auto& [name, tensor] = *entry;
    const int64_t end = begin + int64_t(tensor.bytes.size());
    const Json::Array shape(tensor.shape.begin(), tensor.shape.end());
    header.emplace_back(name,
                        Json::Object{{"dtype", tensor.dtype}, {"shape", shape}, {"data_offsets", Json::Array{begin, end}}});
    data += tensor.bytes;
    begin = end;
  }
  std::string text = Json(std::move(header)).dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string file;
  for (int k = 0; k < 8; ++k) file += static_cast<char>(uint64_t(text.size()) >> (8 * k));
  write_file(path, file + text + data);
}

}  // namespace dmm
