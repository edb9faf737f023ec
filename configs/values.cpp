// Single values: what is a number, a boolean or a string, their bounds, and their text in a dump.
// Stricter than YAML where YAML surprises (010, yes, quoted numbers), wider where people write 1e4
// and 10_000.
#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <limits>

#include "configs/check.h"
#include "configs/names.h"
#include "configs/schema.h"

namespace graft::configs {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// A decimal number as the standard library parses it: no underscores, no plus sign.
struct Decimal {
  std::string text;
  bool is_whole = false;  // digits only
  size_t num_digits = 0;
};

std::optional<Decimal> parse_decimal(const Node& node, std::string& hint) {
  if (node.kind != Node::Kind::kScalar || node.quoted) return std::nullopt;
  const std::string& text = node.text;
  Decimal result;
  size_t i = 0;
  if (i < text.size() && (text[i] == '+' || text[i] == '-')) {
    if (text[i] == '-') result.text += '-';
    ++i;
  }
  const auto digits = [&] {
    const size_t start = i;
    for (; i < text.size(); ++i) {
      const bool separates = text[i] == '_' && i > start && is_digit(text[i - 1]) &&
                             i + 1 < text.size() && is_digit(text[i + 1]);
      if (!is_digit(text[i]) && !separates) break;
      if (is_digit(text[i])) result.text += text[i];
    }
    return i - start;
  };
  const size_t first = i;
  const size_t whole = digits();
  if (whole > 1 && text[first] == '0') {
    hint = "; a leading zero reads as octal elsewhere: remove it";
    return std::nullopt;
  }
  size_t fraction = 0;
  const bool has_point = i < text.size() && text[i] == '.';
  if (has_point) {
    result.text += text[i++];
    fraction = digits();
  }
  if (whole + fraction == 0) return std::nullopt;
  result.num_digits = whole + fraction;
  const bool has_exponent = i < text.size() && (text[i] == 'e' || text[i] == 'E');
  if (has_exponent) {
    result.text += text[i++];
    if (i < text.size() && (text[i] == '+' || text[i] == '-')) result.text += text[i++];
    if (digits() == 0) return std::nullopt;
  }
  result.is_whole = !has_point && !has_exponent;
  return i == text.size() ? std::optional(result) : std::nullopt;
}

template <class T>
std::optional<T> convert(const std::string& text) {
  T value{};
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stop == end ? std::optional(value) : std::nullopt;
}

std::optional<double> parse_number(const Node& node, std::string& hint) {
  const std::optional<Decimal> decimal = parse_decimal(node, hint);
  if (!decimal) return std::nullopt;
  const std::optional<double> value = convert<double>(decimal->text);
  if (!value) hint = "; it is outside the range of a double";
  return value;
}

// Also 1e4 and 2.5e3: fifteen digits below 1e15 are told apart by a double, so "is whole" is exact.
std::optional<int64_t> parse_integer(const Node& node, std::string& hint) {
  const std::optional<Decimal> decimal = parse_decimal(node, hint);
  if (!decimal) return std::nullopt;
  if (decimal->is_whole) {
    const std::optional<int64_t> value = convert<int64_t>(decimal->text);
    if (!value) hint = "; it does not fit 64 bits";
    return value;
  }
  const std::optional<double> value = convert<double>(decimal->text);
  if (!value || decimal->num_digits > 15 || std::abs(*value) >= 1e15 ||
      *value != std::trunc(*value)) {
    return std::nullopt;
  }
  return static_cast<int64_t>(*value);
}

// The shortest text that reads back as the same double, with a point: other readers want one.
std::string number_text(double value) {
  GRAFT_ASSERT(std::isfinite(value), "a config holds a number that is not finite");
  const double size = std::abs(value);
  const bool is_fixed = size == 0 || (size >= 1e-5 && size < 1e15);
  std::array<char, 64> buffer;
  const auto format = is_fixed ? std::chars_format::fixed : std::chars_format::scientific;
  const auto written = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, format);
  std::string text(buffer.data(), written.ptr);
  if (text.find('.') == std::string::npos) text.insert(std::min(text.find('e'), text.size()), ".0");
  return text;
}

// A limit as it is said in messages: 4096, 0.5.
std::string limit_text(double limit) {
  std::array<char, 32> buffer;
  const auto written = std::to_chars(buffer.data(), buffer.data() + buffer.size(), limit);
  return limit == std::trunc(limit) && std::abs(limit) < 1e15
             ? std::to_string(static_cast<int64_t>(limit))
             : std::string(buffer.data(), written.ptr);
}

// Words that YAML 1.1 or a tired reader takes for a boolean.
bool looks_boolean(const std::string& text) {
  constexpr std::array kWords = {"true", "false", "yes", "no", "on", "off"};
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  return std::find(kWords.begin(), kWords.end(), lower) != kWords.end();
}

std::string with_bound(const std::string& noun, const Bound& bound) {
  const std::string text = bound.text();
  return text.empty() ? noun : noun + " " + text;
}

}  // namespace

// --- Bound
// --------------------------------------------------------------------------------------------------------

Bound Bound::at_least(double limit) const {
  Bound result = *this;
  result.low = limit;
  result.low_is_open = false;
  return result;
}

Bound Bound::at_most(double limit) const {
  Bound result = *this;
  result.high = limit;
  result.high_is_open = false;
  return result;
}

Bound Bound::above(double limit) const {
  Bound result = at_least(limit);
  result.low_is_open = true;
  return result;
}

Bound Bound::below(double limit) const {
  Bound result = at_most(limit);
  result.high_is_open = true;
  return result;
}

bool Bound::allows(double value) const {
  if (low && (low_is_open ? value <= *low : value < *low)) return false;
  return !high || !(high_is_open ? value >= *high : value > *high);
}

std::string Bound::text() const {
  if (!choices.empty()) return "one of " + join(choices, ", ");
  if (low && high && !low_is_open && !high_is_open) {
    return *low == *high ? "equal to " + limit_text(*low)
                         : "from " + limit_text(*low) + " to " + limit_text(*high);
  }
  std::string result;
  if (low) result = (low_is_open ? "greater than " : "of at least ") + limit_text(*low);
  if (low && high) result += " and ";
  if (high) result += (high_is_open ? "less than " : "of at most ") + limit_text(*high);
  return result;
}

Bound Fields::one_of(std::vector<std::string> choices) {
  Bound result;
  result.choices = std::move(choices);
  return result;
}

// --- Fields::visit
// ------------------------------------------------------------------------------------------------

void Fields::visit(bool& value) {
  if (!reading()) return write_scalar(Type::kBoolean, value ? "true" : "false");
  const bool is_true = is_word("true");
  if (!is_true && !is_word("false")) return expected("true or false");
  value = is_true;
}

void Fields::visit(int64_t& value) {
  if (!reading()) return write_scalar(Type::kInteger, std::to_string(value));
  std::string hint;
  const std::optional<int64_t> number = parse_integer(*node_, hint);
  if (!number || !bound_.allows(static_cast<double>(*number))) {
    return expected(with_bound("an integer", bound_), hint);
  }
  value = *number;
}

void Fields::visit(int& value) {
  using Limits = std::numeric_limits<int>;
  int64_t wide = value;
  const Bound given = bound_;
  if (reading() && !given.low) bound_ = bound_.at_least(Limits::min());
  if (reading() && !given.high) bound_ = bound_.at_most(Limits::max());
  visit(wide);
  bound_ = given;
  value = static_cast<int>(wide);
}

void Fields::visit(double& value) {
  if (!reading()) return write_scalar(Type::kNumber, number_text(value));
  std::string hint;
  const std::optional<double> number = parse_number(*node_, hint);
  if (!number || !bound_.allows(*number)) return expected(with_bound("a number", bound_), hint);
  value = *number;
}

void Fields::visit(std::string& value) {
  if (!reading()) {
    write_scalar(Type::kString, value);
    doc_->value.quoted = true;
    return;
  }
  const std::vector<std::string>& choices = bound_.choices;
  const bool is_text = node_->kind == Node::Kind::kScalar;
  if (!choices.empty()) {
    const std::string text = is_text ? node_->text : "";
    if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
      const std::string close = nearest(text, choices);
      return expected(bound_.text(), close.empty() ? "" : "; did you mean '" + close + "'?");
    }
  } else if (!is_text) {
    return expected("a string");
  } else if (!node_->quoted && looks_boolean(node_->text)) {
    return expected("a string", "; put it in quotes if it is one");
  }
  value = node_->text;
}

void Fields::visit(StringOrList& value) {
  if (!reading()) {
    const bool is_single = value.is_single && value.values.size() == 1;
    visit(value.values);
    doc_->may_be_single = true;
    if (is_single) {
      const Node item = doc_->value.items.front();
      doc_->value = item;
    }
    return;
  }
  value.is_single = node_->kind == Node::Kind::kScalar;
  if (value.is_single) {
    value.values.assign(1, "");
    visit(value.values.front());
  } else if (node_->kind == Node::Kind::kList) {
    visit(value.values);
  } else {
    expected("a string or a list of strings");
  }
}

}  // namespace graft::configs
