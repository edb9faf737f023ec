#include "data/trial.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "configs/check.h"

namespace graft::data {
namespace {

constexpr unsigned kMaxWaitingSeconds = 600;  // for the disk: only a bug of ours would wait longer

/// The child's death is an answer, not an event: no core, no message, no handler of the parent's.
void die_quietly(rlim_t max_computing_s) {
  const rlimit none{0, 0}, computing{max_computing_s, max_computing_s + 1};
  ::setrlimit(RLIMIT_CORE, &none);
  ::setrlimit(RLIMIT_CPU, &computing);
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGXCPU, SIGALRM})
    ::signal(number, SIG_DFL);
  ::alarm(kMaxWaitingSeconds);
  ::dup2(::open("/dev/null", O_WRONLY | O_CLOEXEC), STDERR_FILENO);
  ::setrlimit(RLIMIT_NOFILE, &none);  // nor the report of a sanitizer
}

void send(int to, std::string_view text) {
  while (!text.empty()) {
    const ssize_t sent = ::write(to, text.data(), text.size());
    if (sent < 0 && errno != EINTR) ::abort();
    text.remove_prefix(std::max<ssize_t>(sent, 0));
  }
}

std::string receive_all(int from) {
  std::string text;
  char part[4096];
  for (ssize_t got; (got = ::read(from, part, sizeof part)) != 0;) {
    if (got < 0 && errno != EINTR) break;
    text.append(part, std::max<ssize_t>(got, 0));
  }
  return text;
}

/// Ends without handlers of exit: they are the parent's.
[[noreturn]] void be_the_child(int to, const std::function<std::string()>& work) {
  try {
    send(to, work());
  } catch (const Error& error) {
    send(to, error.what());
    ::_exit(static_cast<int>(ExitCode::kData));
  }
  ::_exit(0);
}

}  // namespace

std::string in_trial(unsigned max_computing_s, const std::function<std::string()>& work,
                     std::string& death) {
  int ends[2];
  const bool piped = ::pipe2(ends, O_CLOEXEC) == 0;
  const pid_t child = piped ? ::fork() : -1;
  GRAFT_CHECK(child >= 0, ExitCode::kData,
              "no child process to read a file in: ", std::strerror(errno));
  if (child == 0) {
    die_quietly(max_computing_s);
    be_the_child(ends[1], work);
  }
  ::close(ends[1]);
  std::string result = receive_all(ends[0]);
  ::close(ends[0]);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0)
    GRAFT_CHECK(errno == EINTR, ExitCode::kData,
                "lost the child process that read a file: ", std::strerror(errno));
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  GRAFT_CHECK(code != static_cast<int>(ExitCode::kData), ExitCode::kData, result);
  death = WIFSIGNALED(status) ? ::strsignal(WTERMSIG(status))
          : code == 0         ? ""
                              : "exit " + std::to_string(code);
  return result;
}

}  // namespace graft::data
