#include "dmm/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "dmm/error.h"

namespace dmm {
namespace {

constexpr int kDepth = 64;  // nesting; a hostile text must not exhaust the stack

/// The code point that begins at text[at], which is moved behind it; U+FFFFFFFF where the bytes are not UTF-8.
constexpr uint32_t kNone = 0xFFFFFFFF;
uint32_t code_point(std::string_view text, size_t& at) {
  static constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};  // fewer bytes would do below
  const auto byte = [&](size_t k) -> uint32_t { return static_cast<unsigned char>(text[k]); };
  const uint32_t lead = byte(at++);
  const int more = lead < 0x80 ? 0 : lead >> 5 == 6 ? 1 : lead >> 4 == 14 ? 2 : lead >> 3 == 30 ? 3 : -1;
  if (more < 0 || at + more > text.size()) return kNone;
  uint32_t code = more == 0 ? lead : lead & (0x3F >> more);
  for (int k = 0; k < more; ++k, ++at) {
    if (byte(at) >> 6 != 2) return kNone;
    code = code << 6 | (byte(at) & 0x3F);
  }
  return code < kLeast[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000) ? kNone : code;
}

class Parser {
 public:
  Parser(std::string_view text, const std::string& source) : text_(text), source_(source) {}

  Json document() {
    while (at_ < text_.size()) {
      if (code_point(text_, at_) == kNone) fail(source_, ": not a text: a byte before ", at_, " is not UTF-8");
    }
    at_ = 0;
    Json result = value(0);
    space();
    if (at_ < text_.size()) wrong("nothing may follow the value");
    return result;
  }

 private:
  [[noreturn]] void wrong(const char* rule) const {
    const auto begin = text_.begin(), here = begin + std::min(at_, text_.size());
    const auto line = 1 + std::count(begin, here, '\n');
    const auto column = 1 + (here - std::find(std::make_reverse_iterator(here), text_.rend(), '\n').base());
    const char* cut = at_ >= text_.size() ? " (the text stops in the middle: was it written to the end?)" : "";
    fail(source_, ": not valid JSON: line ", line, " column ", column, ": ", rule, cut);
  }

  void space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kDepth) wrong("nested too deeply");
    space();
    if (at_ >= text_.size()) wrong("a value is missing");
    if (take("null")) return {};
    if (take("true")) return true;
    if (take("false")) return false;
    switch (text_[at_]) {
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case '"':
        return string();
      default:
        return number();
    }
  }

  Json array(int depth) {
    Json::Array items;
    ++at_;
    space();
    if (take("]")) return items;
    do items.push_back(value(depth + 1));
    while (more(']'));
    return items;
  }

  Json object(int depth) {
    Json::Object members;
    ++at_;
    space();
    if (take("}")) return members;
    do {
      space();
      if (at_ >= text_.size() || text_[at_] != '"') wrong("a name in quotes is missing");
      std::string name = string();
      space();
      if (!take(":")) wrong("':' is missing");
      members.emplace_back(std::move(name), value(depth + 1));
    } while (more('}'));
    return members;
  }

  bool more(char end) {
    space();
    if (take(",")) return true;
    if (!take({&end, 1})) wrong("',' or the closing bracket is missing");
    return false;
  }

  std::string string() {
    std::string result;
    for (++at_;;) {
      if (at_ >= text_.size()) wrong("the closing quote is missing");
      const char c = text_[at_++];
      if (c == '"') return result;
      if (static_cast<unsigned char>(c) < 0x20) wrong("a control character in a string");
      if (c == '\\') {
        escape(result);
      } else {
        result += c;
      }
    }
  }

  void escape(std::string& result) {
    static constexpr std::string_view kNames = "\"\\/bfnrt", kValues = "\"\\/\b\f\n\r\t";
    if (at_ >= text_.size()) wrong("the closing quote is missing");
    const char c = text_[at_++];
    if (const auto index = kNames.find(c); index != std::string_view::npos) {
      result += kValues[index];
      return;
    }
    if (c != 'u') wrong("an unknown escape");
    uint32_t code = hex4();
    if (code >= 0xD800 && code < 0xE000) {  // half of a pair
      if (code >= 0xDC00 || !take("\\u")) wrong("half of a surrogate pair");
      const uint32_t low = hex4();
      if (low < 0xDC00 || low >= 0xE000) wrong("half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;  // bytes that follow in UTF-8
    static constexpr uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
    result += static_cast<char>(kLead[more] | code >> (6 * more));
    for (int k = more - 1; k >= 0; --k) result += static_cast<char>(0x80 | (code >> (6 * k) & 0x3F));
  }

  uint32_t hex4() {
    uint32_t code = 0;
    const std::string_view digits = text_.substr(std::min(at_, text_.size()), 4);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (digits.size() < 4 || error != std::errc() || end != digits.data() + 4) wrong("\\u needs four hex digits");
    at_ += 4;
    return code;
  }

  Json number() {
    const size_t begin = at_;
    const auto digits = [&] {
      const size_t first = at_;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
      if (at_ == first) wrong("no JSON value begins like this");
      return at_ - first;
    };
    take("-");
    const bool zero = at_ < text_.size() && text_[at_] == '0';
    if (digits() > 1 && zero) wrong("a number must not begin with 0");
    bool whole = true;
    if (take(".")) digits(), whole = false;
    if (take("e") || take("E")) {
      if (!take("+")) take("-");
      digits(), whole = false;
    }
    const char *first = text_.data() + begin, *last = text_.data() + at_;
    if (int64_t integer; whole && std::from_chars(first, last, integer).ec == std::errc()) return integer;
    double real = 0;
    if (std::from_chars(first, last, real).ec != std::errc()) wrong("the number is out of range");
    return real;
  }

  std::string_view text_;
  const std::string& source_;
  size_t at_ = 0;
};

void write(const std::string& text, std::string& out) {
  const auto unit = [&out](uint32_t code) {
    out += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out += "0123456789abcdef"[code >> shift & 15];
  };
  out += '"';
  for (size_t at = 0; at < text.size();) {
    const uint32_t code = code_point(text, at);
    if (code == '"' || code == '\\') {
      out += {'\\', static_cast<char>(code)};
    } else if (code >= 0x20 && code < 0x7F) {
      out += static_cast<char>(code);
    } else if (code < 0x10000) {
      unit(code);
    } else {
      unit(0xD800 + ((code - 0x10000) >> 10));
      unit(0xDC00 + ((code - 0x10000) & 0x3FF));
    }
  }
  out += '"';
}

void write(const Json& json, std::string& out) {
  char digits[32];
  if (const auto* truth = json.get<bool>()) {
    out += *truth ? "true" : "false";
  } else if (const auto* integer = json.get<int64_t>()) {
    out += std::to_string(*integer);
  } else if (const auto* real = json.get<double>()) {
    std::string text(digits, std::to_chars(digits, digits + sizeof digits, *real).ptr);  // the shortest that reads back
    if (text.find_first_of(".e") == std::string::npos) text += ".0";
    out += text;
  } else if (const auto* text = json.get<std::string>()) {
    write(*text, out);
  } else if (const auto* array = json.get<Json::Array>()) {
    const char* separator = "[";
    for (const Json& item : *array) out += std::exchange(separator, ", "), write(item, out);
    out += array->empty() ? "[]" : "]";
  } else if (const auto* object = json.get<Json::Object>()) {
    const char* separator = "{";
    for (const auto& [name, member] : *object) {
      out += std::exchange(separator, ", ");
      write(name, out);
      out += ": ";
      write(member, out);
    }
    out += object->empty() ? "{}" : "}";
  } else {
    out += "null";
  }
}

}  // namespace

Json Json::parse(std::string_view text, const std::string& source) { return Parser(text, source).document(); }

std::string Json::dump() const {
  std::string out;
  write(*this, out);
  return out;
}

bool Json::number(double& result) const {
  if (const auto* integer = get<int64_t>()) {
    result = static_cast<double>(*integer);
  } else if (const auto* real = get<double>(); real && std::isfinite(*real)) {
    result = *real;
  } else {
    return false;
  }
  return true;
}

const Json* Json::find(std::string_view name) const {
  const auto* members = get<Object>();
  if (!members) return nullptr;
  const auto found = std::find_if(members->rbegin(), members->rend(), [&](const auto& m) { return m.first == name; });
  return found == members->rend() ? nullptr : &found->second;
}

bool Json::operator==(const Json& other) const {
  double a, b;
  if (number(a) && other.number(b)) return a == b;
  const auto *mine = get<Object>(), *theirs = other.get<Object>();
  if (!mine || !theirs) return value_ == other.value_;
  return mine->size() == theirs->size() && std::all_of(mine->begin(), mine->end(), [&](const auto& member) {
           const Json* value = other.find(member.first);
           return value && *value == member.second;
         });
}

}  // namespace dmm
