// TokenizerPipe: the tokenizer of a model, in a Python process at the other end of a pipe
// (data/prepare/tokenizer_pipe.py). Generating and merging need it; a training run never starts
// Python.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace graft::launcher {

class TokenizerPipe {
 public:
  /// @throws graft::Error if the interpreter (kUsage) or the tokenizer cannot be had, as each call
  /// below does: in the helper's own words, with its exit code
  explicit TokenizerPipe(const std::string& model_path);
  ~TokenizerPipe();
  TokenizerPipe(const TokenizerPipe&) = delete;
  TokenizerPipe& operator=(const TokenizerPipe&) = delete;

  /// A user's message through the model's chat template, up to where the answer begins; without a
  /// template the plain text. @param prompt  UTF-8
  std::vector<int64_t> render(const std::string& prompt);
  std::string decode(const std::vector<int64_t>& ids);
  /// What a Hugging Face folder with this tokenizer holds: file name to content.
  std::map<std::string, std::string> files();
  const std::vector<int64_t>& eos_ids() const { return eos_ids_; }

 private:
  nlohmann::json ask(const nlohmann::json& question);
  [[noreturn]] void fail_as_the_helper_did();

  pid_t child_ = -1;
  FILE* to_ = nullptr;
  FILE* from_ = nullptr;
  std::vector<int64_t> eos_ids_;
  bool has_template_ = false;
};

}  // namespace graft::launcher
