// Where log lines go and what they look like.
#include "configs/log.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <regex>
#include <sstream>

#include "configs/check.h"

namespace graft::log {
namespace {

class Log : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::remove_all(folder_); }
  void TearDown() override {
    init({});
    std::filesystem::remove_all(folder_);
  }

  // What standard error shows when each level says its own name.
  std::string say_everything(const Options& options) {
    init(options);
    testing::internal::CaptureStderr();
    debug("d");
    info("i {} %v");
    warn("w");
    error("e");
    return testing::internal::GetCapturedStderr();
  }

  std::string file_text() const {
    std::ostringstream text;
    text << std::ifstream(file_).rdbuf();
    return text.str();
  }

  const std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / ("graft_log_test_" + std::to_string(getpid()));
  const std::string file_ = folder_ / "logs" / "rank-1.log";
};

TEST_F(Log, ControlsOfATerminalAreNotPassedOn) {
  init({});
  testing::internal::CaptureStderr();
  error(
      "a\x1b[2Jb\rc\x7f\xc2\x9b"
      "d\n\t\xc3\xa9");
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "error: a?[2Jb?c??d\n\t\xc3\xa9\n");
}

TEST_F(Log, RankZeroPrintsPlainLinesOnStandardError) {
  EXPECT_EQ(say_everything({}), "i {} %v\nwarning: w\nerror: e\n");
}

TEST_F(Log, DebugMessagesAreShownOnRequest) {
  EXPECT_EQ(say_everything({.file = "", .debug = true}),
            "debug: d\ni {} %v\nwarning: w\nerror: e\n");
}

TEST_F(Log, OtherRanksPrintOnlyErrorsWithTheirRank) {
  EXPECT_EQ(say_everything({.rank = 1, .world = 4, .file = ""}), "error: rank 1: e\n");
}

TEST_F(Log, StandardOutputStaysFree) {
  testing::internal::CaptureStdout();
  say_everything({});
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "");
}

TEST_F(Log, EveryRankWritesTimestampedLinesToItsFile) {
  say_everything({.rank = 1, .world = 4, .file = file_});
  const std::string stamp = R"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d rank 1/4 )";
  EXPECT_TRUE(std::regex_match(file_text(), std::regex(stamp + "info: i \\{\\} %v\n" + stamp +
                                                       "warning: w\n" + stamp + "error: e\n")))
      << file_text();
}

TEST_F(Log, AFileIsAppendedTo) {
  say_everything({.file = file_});
  const size_t once = file_text().size();
  say_everything({.file = file_});
  EXPECT_EQ(file_text().size(), 2 * once);
}

TEST_F(Log, AFileAddedLaterHasWhatWasSaidBeforeToo) {
  say_everything({.rank = 1, .world = 4, .file = ""});
  add_file(file_);
  info("later");
  const std::string late = file_text();
  std::filesystem::remove_all(folder_);
  say_everything({.rank = 1, .world = 4, .file = file_});
  info("later");
  const std::regex stamp(R"(\d{4}-\S+ )");
  EXPECT_EQ(std::regex_replace(late, stamp, ""), std::regex_replace(file_text(), stamp, ""));
  EXPECT_NE(late, "");
}

TEST_F(Log, AFileThatCannotBeWrittenIsAUsageError) {
  EXPECT_THROW(init({.file = "/proc/nowhere/rank-0.log"}), Error);
}

}  // namespace
}  // namespace graft::log
