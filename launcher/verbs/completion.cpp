// graft completion: scripts for shells, made from the parser's own tree of verbs and options, the
// catalogues, and what prepare.py takes.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <sstream>

#include "configs/names.h"
#include "launcher/verbs/verbs.h"
#include "launcher/version.h"
#include "peft/method.h"

namespace graft::launcher {
namespace {

/// What a value may be; without words: a file, or anything.
struct Choices {
  std::vector<std::string> words;
  bool or_file = false;
};

struct Flag {
  std::string name, doc;  ///< "--dtype"
  bool takes_value = false;
  Choices choices;
};

struct Verb {
  std::string name, doc;
  std::vector<Flag> flags;
  Choices positional;
};

/// The values of CLI::IsMember, which an option shows as "TEXT:{a,b,c}".
std::vector<std::string> choices_of(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const size_t begin = type.find('{'), end = type.rfind('}');
  std::vector<std::string> choices;
  if (begin == std::string::npos || end == std::string::npos) return choices;
  std::istringstream in(type.substr(begin + 1, end - begin - 1));
  for (std::string word; std::getline(in, word, ',');) choices.push_back(word);
  return choices;
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& method : peft::method_facts()) names.push_back(method.name);
  return names;
}

std::vector<std::string> shape_names() {
  namespace fs = std::filesystem;
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(source_dir() + "/configs/models")) {
    if (entry.path().extension() == ".yaml") names.push_back(entry.path().stem());
  }
  std::sort(names.begin(), names.end());
  return names;
}

/// What the parser takes as any text.
void add_what_the_parser_does_not_know(Verb& verb) {
  if (verb.name == "methods") verb.positional = {method_names(), false};
  if (verb.name == "models") verb.positional = {shape_names(), true};
  for (Flag& flag : verb.flags) {
    if (flag.name == "--resume") flag.choices = {{"auto", "never"}, true};
  }
  if (verb.name != "prepare") return;
  verb.positional = {{"text", "chat", "classification"}, true};
  verb.flags = {{"--help", "how to use it", false, {}},
                {"--input", "input files", true, {}},
                {"--model", "GGUF file or Hugging Face directory", true, {}},
                {"--output", "folder for the shards", true, {}},
                {"--eval-fraction", "share held out", true, {}},
                {"--max-length", "tokens a sample", true, {}},
                {"--prompt", "the user's message", true, {}},
                {"--plain", "the text alone, for a head over labels", false, {}},
                {"--max-samples-per-file", "read the first N records", true, {}},
                {"--shard-tokens", "tokens a shard", true, {}}};
}

Verb verb_of(const CLI::App& app) {
  Verb verb{app.get_name(), app.get_description(), {}, {}};
  for (const CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty()) {
      for (const std::string& word : choices_of(*option)) verb.positional.words.push_back(word);
    }
    for (const std::string& name : option->get_lnames()) {
      verb.flags.push_back({"--" + name,
                            option->get_description(),
                            option->get_items_expected_max() > 0,
                            {choices_of(*option), false}});
    }
  }
  add_what_the_parser_does_not_know(verb);
  return verb;
}

std::vector<Verb> verbs_of(const CLI::App& app) {
  std::vector<Verb> verbs;
  for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; }))
    verbs.push_back(verb_of(*verb));
  return verbs;
}

/// All words that may follow a verb, or `graft` itself.
std::string words_of(const Verb& verb) {
  std::vector<std::string> words = verb.positional.words;
  for (const Flag& flag : verb.flags) words.push_back(flag.name);
  return configs::join(words, " ");
}

std::string bash(const Verb& root, const std::vector<Verb>& verbs) {
  std::string names, words, values;
  for (const Verb& verb : verbs) {
    names += verb.name + " ";
    words += "    " + verb.name + ") words=\"" + words_of(verb) + "\" ;;\n";
    for (const Flag& flag : verb.flags) {
      if (!flag.takes_value) continue;
      values += "    \"" + verb.name + " " + flag.name + "\") words=\"" +
                configs::join(flag.choices.words, " ") + "\" ;;\n";
    }
  }
  // A value without choices leaves no word, and `-o default` then offers files.
  return "# source <(graft completion bash)\n"
         "_graft() {\n"
         "  local word verb= words=\n"
         "  for word in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do\n"
         "    if [[ $word != -* ]]; then verb=$word; break; fi\n"
         "  done\n"
         "  case $verb in\n    \"\") words=\"" +
         names + words_of(root) + "\" ;;\n" + words +
         "  esac\n"
         "  case \"$verb ${COMP_WORDS[COMP_CWORD-1]}\" in\n" +
         values +
         "  esac\n"
         "  COMPREPLY=($(compgen -W \"$words\" -- \"${COMP_WORDS[COMP_CWORD]}\"))\n"
         "}\n"
         "complete -o default -F _graft graft\n";
}

/// Inside '...': a quote ends the string, is escaped, and begins it again.
std::string quoted(const std::string& text) {
  std::string out;
  for (const char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return "'" + out + "'";
}

/// In a specification of _arguments or _describe, ':', '[' and ']' have meanings of their own.
std::string zsh_text(const std::string& text) {
  std::string out;
  for (const char c : text)
    out += (c == ':' || c == '[' || c == ']' ? "\\" : "") + std::string(1, c);
  return out;
}

std::string zsh_action(const Choices& choices) {
  const std::string words = configs::join(choices.words, " ");
  if (words.empty()) return "_files";
  return choices.or_file ? "{compadd -- " + words + "; _files}" : "(" + words + ")";
}

std::string zsh(const Verb& root, const std::vector<Verb>& verbs) {
  std::string names, cases;
  for (const Verb& verb : verbs) {
    names += "    " + quoted(verb.name + ":" + zsh_text(verb.doc)) + "\n";
    cases += "    " + verb.name + ") _arguments";
    for (const Flag& flag : verb.flags) {
      const std::string value = flag.takes_value ? ":value:" + zsh_action(flag.choices) : "";
      cases += " \\\n      " + quoted("*" + flag.name + "[" + zsh_text(flag.doc) + "]" + value);
    }
    cases += " \\\n      " + quoted("*:word:" + zsh_action(verb.positional)) + " ;;\n";
  }
  return "#compdef graft\n# graft completion zsh > a folder of $fpath, as _graft\n"
         "_graft() {\n  local -a verbs=(\n" +
         names +
         "  )\n"
         "  if (( CURRENT == 2 )); then\n"
         "    if [[ $words[2] == -* ]]; then compadd -- " +
         words_of(root) +
         "; else _describe verb verbs; fi\n"
         "    return\n  fi\n"
         "  local verb=$words[2]\n  shift words\n  (( CURRENT-- ))\n"
         "  case $verb in\n" +
         cases +
         "  esac\n}\n"
         "if [[ $funcstack[1] == _graft ]]; then _graft \"$@\"; else compdef _graft graft; fi\n";
}

std::string fish_words(const Choices& choices, const std::string& without_files) {
  if (choices.words.empty()) return "";
  return (choices.or_file ? "" : without_files) + " -a " +
         quoted(configs::join(choices.words, " "));
}

std::string fish_flags(const std::string& condition, const std::vector<Flag>& flags) {
  std::string text;
  for (const Flag& flag : flags) {
    text += "complete -c graft -n " + quoted(condition) + " -l " + flag.name.substr(2) + " -d " +
            quoted(flag.doc);
    if (flag.takes_value) text += " -r" + fish_words(flag.choices, " -f");
    text += "\n";
  }
  return text;
}

std::string fish(const Verb& root, const std::vector<Verb>& verbs) {
  std::string text = "# graft completion fish > ~/.config/fish/completions/graft.fish\n" +
                     fish_flags("__fish_use_subcommand", root.flags);
  for (const Verb& verb : verbs) {
    const std::string here = "__fish_seen_subcommand_from " + verb.name;
    text += "complete -c graft -f -n '__fish_use_subcommand' -a " + verb.name + " -d " +
            quoted(verb.doc) + "\n";
    text += fish_flags(here, verb.flags);
    if (!verb.positional.words.empty())
      text += "complete -c graft -n " + quoted(here) + fish_words(verb.positional, " -f") + "\n";
  }
  return text;
}

}  // namespace

void add_completion(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("completion", "A completion script for a shell");
  auto shell = std::make_shared<std::string>();
  verb->add_option("SHELL", *shell)->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  verb->footer(
      "Examples:\n  source <(graft completion bash)\n"
      "  graft completion fish > ~/.config/fish/completions/graft.fish");
  verb->callback([shell, &app, &command] {
    command.run = [shell, &app] {
      const auto verbs = verbs_of(app);
      const Verb root = verb_of(app);
      const std::string script = *shell == "bash"  ? bash(root, verbs)
                                 : *shell == "zsh" ? zsh(root, verbs)
                                                   : fish(root, verbs);
      std::fputs(script.c_str(), stdout);
      return 0;
    };
  });
}

}  // namespace graft::launcher
