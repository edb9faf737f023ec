#include "launcher/tokenizer_pipe.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdlib>
#include <utility>

#include "configs/check.h"
#include "launcher/version.h"
#include "models/io/json_file.h"

extern char** environ;  // NOLINT: POSIX declares it so

namespace graft::launcher {

TokenizerPipe::TokenizerPipe(const std::string& model_path) {
  std::array<int, 2> down{}, up{};
  GRAFT_ASSERT(pipe2(down.data(), O_CLOEXEC) == 0 && pipe2(up.data(), O_CLOEXEC) == 0, "no pipe");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, down[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, up[1], STDOUT_FILENO);
  const std::string script = source_dir() + "/data/prepare/tokenizer_pipe.py",
                    interpreter = python();
  std::array<const char*, 5> argv{interpreter.c_str(), script.c_str(), "--model",
                                  model_path.c_str(), nullptr};
  const int failed = posix_spawnp(&child_, interpreter.c_str(), &actions, nullptr,
                                  const_cast<char**>(argv.data()), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(down[0]), close(up[1]);
  to_ = fdopen(down[1], "w"), from_ = fdopen(up[0], "r");
  GRAFT_CHECK(failed == 0, interpreter, " cannot be started; run cluster/install.sh");
  std::signal(SIGPIPE,
              SIG_IGN);  // a helper that is gone is an error of ask(), not the end of this process
  const nlohmann::json info = ask({{"op", "info"}});
  eos_ids_ = info.at("eos_ids").get<std::vector<int64_t>>();
  has_template_ = info.at("has_chat_template").get<bool>();
}

TokenizerPipe::~TokenizerPipe() {
  if (to_ != nullptr) std::fclose(to_);
  if (from_ != nullptr) std::fclose(from_);
  if (child_ > 0) waitpid(child_, nullptr, 0);
}

nlohmann::json TokenizerPipe::ask(const nlohmann::json& question) {
  const std::string line = question.dump() + "\n";
  std::fputs(line.c_str(), to_);
  std::fflush(to_);
  char* answer = nullptr;
  size_t capacity = 0;
  const ssize_t length = getline(&answer, &capacity, from_);
  const std::string text(answer, length > 0 ? static_cast<size_t>(length) : 0);
  std::free(answer);
  if (text.empty()) fail_as_the_helper_did();
  nlohmann::json reply = models::io::parse_json(text, "tokenizer");
  GRAFT_CHECK(!reply.contains("error"), static_cast<ExitCode>(reply.value("exit_code", 1)),
              "tokenizer: ", reply.value("error", ""));
  return reply;
}

void TokenizerPipe::fail_as_the_helper_did() {
  int status = 0;
  waitpid(std::exchange(child_, -1), &status, 0);
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
  throw Error(static_cast<ExitCode>(std::max(code, static_cast<int>(ExitCode::kBug))),
              "the tokenizer's helper process ended (see above); does " + python() +
                  " have the packages that cluster/install.sh installs?");
}

std::vector<int64_t> TokenizerPipe::render(const std::string& prompt) {
  if (!has_template_)
    return ask({{"op", "encode"}, {"text", prompt}}).at("ids").get<std::vector<int64_t>>();
  const nlohmann::json messages = {{{"role", "user"}, {"content", prompt}}};
  return ask({{"op", "render"}, {"messages", messages}}).at("ids").get<std::vector<int64_t>>();
}

std::string TokenizerPipe::decode(const std::vector<int64_t>& ids) {
  return ask({{"op", "decode"}, {"ids", ids}}).at("text").get<std::string>();
}

std::map<std::string, std::string> TokenizerPipe::files() {
  return ask({{"op", "files"}}).at("files").get<std::map<std::string, std::string>>();
}

}  // namespace graft::launcher
