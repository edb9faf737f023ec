#include "peft/module_pattern.h"

#include <bitset>
#include <cctype>
#include <string>
#include <utility>
#include <vector>

#include "configs/check.h"

namespace graft::peft {
namespace {

using Positions = ModulePattern::Positions;
using Step = ModulePattern::Step;
using Text = ModulePattern::Text;
using Characters = std::bitset<128>;

constexpr size_t kMaxLength = 512;  // of a key and of a module's name
constexpr int kMaxDepth = 16;       // of groups
constexpr int kUnlimited = -1;

Step one_of(const Characters& characters) {
  return [=](const Text& whole, const Positions& begins) {
    const std::string_view text = whole.characters;
    Positions ends;
    for (const size_t p : begins) {
      const size_t c = p < text.size() ? static_cast<unsigned char>(text[p]) : characters.size();
      if (c < characters.size() && characters[c]) ends.insert(p + 1);
    }
    return ends;
  };
}

Step at_begin() {
  return [](const Text&, const Positions& begins) {
    return begins.contains(0) ? Positions{0} : Positions{};
  };
}

Step at_end() {
  return [](const Text& text, const Positions& begins) {
    const size_t end = text.characters.size();
    return begins.contains(end) ? Positions{end} : Positions{};
  };
}

Step in_turn(std::vector<Step> steps) {
  return [steps = std::move(steps)](const Text& text, Positions reached) {
    text.spend(reached.size());
    for (size_t i = 0; i < steps.size() && !reached.empty(); ++i) {
      text.spend(reached.size());
      reached = steps[i](text, reached);
    }
    return reached;
  };
}

Step either(std::vector<Step> steps) {
  return [steps = std::move(steps)](const Text& text, const Positions& begins) {
    Positions ends;
    for (const Step& step : steps) ends.merge(step(text, begins));
    return ends;
  };
}

Step repeated(const Step& step, int least, int most) {
  return [=](const Text& text, Positions reached) {
    for (int i = 0; i < least && !reached.empty(); ++i) {
      text.spend(reached.size());
      Positions next = step(text, reached);
      if (next == reached) break;  // once more changes nothing
      reached = std::move(next);
    }
    Positions fresh = reached;
    for (int i = least; (most == kUnlimited || i < most) && !fresh.empty(); ++i) {
      text.spend(fresh.size());
      Positions next = step(text, std::exchange(fresh, {}));
      for (const size_t p : next) {
        if (reached.insert(p).second) fresh.insert(p);
      }
    }
    return reached;
  };
}

Characters where(int (*is_member)(int)) {
  Characters set;
  for (size_t c = 0; c < set.size(); ++c) set[c] = is_member(static_cast<int>(c)) != 0;
  return set;
}

Characters any_but_newline() { return ~Characters().set('\n'); }

class Parser {
 public:
  explicit Parser(std::string_view key) : key_(key) {}

  Step parse() {
    require(key_.size() <= kMaxLength, "is too long");
    Step step = alternatives();
    require(done(), "has a ) too many");
    return step;
  }

 private:
  Step alternatives() {
    std::vector<Step> branches{sequence()};
    while (take('|')) branches.push_back(sequence());
    return branches.size() == 1 ? std::move(branches.front()) : either(std::move(branches));
  }

  Step sequence() {
    std::vector<Step> steps;
    while (!done() && !next_is("|)")) steps.push_back(quantified());
    return in_turn(std::move(steps));
  }

  Step quantified() {
    const bool is_anchor = next_is("^$");
    Step step = atom();
    if (!next_is("*+?{")) return step;
    require(!is_anchor, "repeats ^ or $");
    int least = 0, most = kUnlimited;
    switch (key_[at_++]) {
      case '+':
        least = 1;
        break;
      case '?':
        most = 1;
        break;
      case '{':
        least = number(0);
        most = take(',') ? number(kUnlimited) : least;
        require(take('}') && (most == kUnlimited || least <= most),
                "has braces that are no repetition");
    }
    take('?');  // as few as possible: the same names match
    require(!next_is("*+?{"), "repeats a repetition");
    return repeated(step, least, most);
  }

  Step atom() {
    const char c = key_[at_++];
    switch (c) {
      case '(':
        return group();
      case '[':
        return one_of(bracket());
      case '\\':
        return one_of(escaped());
      case '.':
        return one_of(any_but_newline());
      case '^':
        return at_begin();
      case '$':
        return at_end();
      default:
        require(std::string_view("*+?{").find(c) == std::string_view::npos, "repeats nothing");
        return one_of(literal(c));
    }
  }

  Step group() {
    require(++depth_ <= kMaxDepth, "has too many groups in one another");
    if (take('?')) require(take(':'), "uses a (? that is not supported");
    Step step = alternatives();
    require(take(')'), "has a ( without its )");
    --depth_;
    return step;
  }

  Characters bracket() {
    const bool inverted = take('^');
    Characters set;
    for (bool first = true; first || !next_is("]"); first = false) {
      require(!done(), "has a [ without its ]");
      const char low = key_[at_++];
      if (low == '\\') {
        set |= escaped();
        require(!range_follows(), "has a range from an escape, which is not supported");
      } else if (range_follows()) {
        const char high = key_[++at_];
        ++at_;
        require(high != '\\' && low <= high, "has a range that is none");
        for (char c = low; c < high; ++c) set |= literal(c);
        set |= literal(high);
      } else {
        set |= literal(low);
      }
    }
    ++at_;
    return inverted ? ~set : set;
  }

  Characters escaped() {
    require(!done(), "ends in a backslash");
    const char c = key_[at_++];
    Characters word = where(std::isalnum);
    word.set('_');
    switch (c) {
      case 'd':
        return where(std::isdigit);
      case 'D':
        return ~where(std::isdigit);
      case 'w':
        return word;
      case 'W':
        return ~word;
      default:
        require(std::isalnum(static_cast<unsigned char>(c)) == 0,
                "uses an escape that is not supported");
        return literal(c);
    }
  }

  Characters literal(char c) const {
    require(static_cast<unsigned char>(c) < Characters().size(), "is not ASCII");
    return Characters().set(static_cast<size_t>(c));
  }

  int number(int otherwise) {
    const size_t begin = at_;
    while (next_is("0123456789")) ++at_;
    if (at_ == begin) return otherwise;
    require(at_ - begin <= 3, "repeats too often");
    return std::stoi(std::string(key_.substr(begin, at_ - begin)));
  }

  bool done() const { return at_ == key_.size(); }
  bool next_is(std::string_view any) const {
    return !done() && any.find(key_[at_]) != std::string_view::npos;
  }
  bool range_follows() const {
    return next_is("-") && at_ + 1 < key_.size() && key_[at_ + 1] != ']';
  }
  bool take(char c) {
    const bool taken = !done() && key_[at_] == c;
    at_ += taken ? 1 : 0;
    return taken;
  }
  void require(bool holds, const char* otherwise) const {
    GRAFT_CHECK(holds, ExitCode::kData, "adapter_config.json: the pattern '",
                key_.substr(0, kMaxLength), "' ", otherwise);
  }

  std::string_view key_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace

ModulePattern::ModulePattern(std::string_view key) : key_(key), step_(Parser(key).parse()) {}

void ModulePattern::Text::spend(size_t positions) const {
  GRAFT_CHECK(
      positions <= work, ExitCode::kData, "adapter_config.json: matching the pattern '", key,
      "' takes too long; write it without repetitions in one another, or with fewer entries "
      "beside it");
  work -= positions;
}

bool ModulePattern::matches(std::string_view module, size_t& work) const {
  GRAFT_CHECK(module.size() <= kMaxLength, ExitCode::kData, "the module name '",
              module.substr(0, kMaxLength), "...' is too long");
  Positions begins = {0};
  for (size_t i = 0; i < module.size(); ++i) {
    if (module[i] == '.') begins.insert(i + 1);
  }
  return step_({module, key_, work}, begins).contains(module.size());
}

}  // namespace graft::peft
