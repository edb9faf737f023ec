// Rank-aware logging, strings only: rank 0 to the terminal, every rank to its own file. Every
// folder may include this header; spdlog lives in log.cpp alone, because its fmt and LibTorch's do
// not mix.
#pragma once

#include <string>
#include <string_view>

namespace graft::log {

/// Where messages go. Before init() everything goes to standard error.
struct Options {
  int rank = 0;
  int world = 1;
  std::string file;    ///< this rank's log file, appended; empty: none
  bool debug = false;  ///< also debug messages
};

void init(const Options& options);
/// Also into this file, appended: the messages so far (the last hundred of them) and those to come;
/// all else stays as it is.
/// @throws graft::Error (kUsage) if it cannot be written
void add_file(const std::string& path);

void debug(std::string_view message);
void info(std::string_view message);  ///< rank 0 on the terminal, all ranks in their files
void warn(std::string_view message);
void error(std::string_view message);

}  // namespace graft::log
