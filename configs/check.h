// The error type of the project, with its exit code, and the two checks. Every folder may include
// this header. User mistakes (config, files, shapes) go through GRAFT_CHECK and say what, the
// value, where and what to do; GRAFT_ASSERT is for bugs of ours. Only launcher/main.cpp catches.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace graft {

/// Exit codes of every verb (the contract with scripts and schedulers).
enum class ExitCode : int {
  kDone = 0,
  kBug = 1,
  kUsage = 2,
  kData = 3,
  kMemory = 4,
  kCommunication = 5,
  kNoCheckpoint = 6,
  kNumerics = 7,
  kPreempted = 75,
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

namespace detail {

template <class... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

template <class First, class... Rest>
Error make_error(const First& first, const Rest&... rest) {
  if constexpr (std::is_same_v<First, ExitCode>) {
    return Error(first, concat(rest...));
  } else {
    return Error(ExitCode::kUsage, concat(first, rest...));
  }
}

}  // namespace detail
}  // namespace graft

/// GRAFT_CHECK(cond, [ExitCode,] parts...): throws Error with the parts joined; the code is kUsage
/// unless given.
#define GRAFT_CHECK(cond, ...)                                   \
  do {                                                           \
    if (!(cond)) throw ::graft::detail::make_error(__VA_ARGS__); \
  } while (false)

/// GRAFT_ASSERT(cond, parts...): a bug of ours, exit code 1; names the place.
#define GRAFT_ASSERT(cond, ...)                                                                   \
  do {                                                                                            \
    if (!(cond))                                                                                  \
      throw ::graft::Error(::graft::ExitCode::kBug,                                               \
                           ::graft::detail::concat("internal error at ", __FILE__, ":", __LINE__, \
                                                   " (" #cond "): ", __VA_ARGS__));               \
  } while (false)
