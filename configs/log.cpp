// configs/log.h on spdlog: plain lines on standard error (coloured on a terminal only), timestamped
// ones in the rank's file. Standard output stays free for what a verb prints.
#include "configs/log.h"

#include <spdlog/logger.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/ringbuffer_sink.h>
#include <spdlog/sinks/stdout_color_sinks.h>

#include <memory>
#include <utility>

#include "configs/check.h"
#include "configs/names.h"

namespace graft::log {
namespace {

using spdlog::level::level_enum;

// Writes "warning: " or "error: "; other levels need no prefix.
class Prefix : public spdlog::custom_flag_formatter {
 public:
  void format(const spdlog::details::log_msg& message, const std::tm&,
              spdlog::memory_buf_t& out) override {
    std::string_view text;
    if (message.level == level_enum::debug) text = "debug: ";
    if (message.level == level_enum::warn) text = "warning: ";
    if (message.level == level_enum::err) text = "error: ";
    out.append(text.data(), text.data() + text.size());
  }
  std::unique_ptr<custom_flag_formatter> clone() const override {
    return std::make_unique<Prefix>();
  }
};

// The terminal shows rank 0, and errors of every rank: the caller decides who reports an error of
// the job.
spdlog::sink_ptr terminal_sink(int rank) {
  auto sink = std::make_shared<spdlog::sinks::stderr_color_sink_mt>();
  auto formatter = std::make_unique<spdlog::pattern_formatter>();
  const std::string who = rank == 0 ? "" : "rank " + std::to_string(rank) + ": ";
  formatter->add_flag<Prefix>('*').set_pattern("%^%*%$" + who + "%v");
  sink->set_formatter(std::move(formatter));
  sink->set_level(rank == 0 ? level_enum::debug : level_enum::err);
  return sink;
}

spdlog::sink_ptr file_sink(const Options& options) {
  try {
    auto sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(options.file);
    sink->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z rank " + std::to_string(options.rank) + "/" +
                      std::to_string(options.world) + " %l: %v");
    return sink;
  } catch (const spdlog::spdlog_ex& failure) {
    throw Error(ExitCode::kUsage,
                "cannot write the log file '" + options.file + "': " + failure.what());
  }
}

// Holds the last messages until add_file() names a file for them.
using EarlySink = spdlog::sinks::ringbuffer_sink_mt;
constexpr size_t kEarlyMessages = 100;

std::unique_ptr<spdlog::logger> make_logger(const Options& options) {
  auto result = std::make_unique<spdlog::logger>("graft", terminal_sink(options.rank));
  result->sinks().push_back(options.file.empty() ? std::make_shared<EarlySink>(kEarlyMessages)
                                                 : file_sink(options));
  result->set_level(options.debug ? level_enum::debug : level_enum::info);
  result->flush_on(level_enum::debug);  // a killed rank leaves its last line
  return result;
}

Options& chosen() {
  static Options options;
  return options;
}

std::unique_ptr<spdlog::logger>& logger() {
  static std::unique_ptr<spdlog::logger> instance = make_logger({});
  return instance;
}

void write(level_enum level, std::string_view message) {
  const std::string text = configs::printable(message);
  logger()->log(level, spdlog::string_view_t(text.data(), text.size()));
}

}  // namespace

void init(const Options& options) {
  chosen() = options;
  logger() = make_logger(options);
}

void add_file(const std::string& path) {
  chosen().file = path;
  spdlog::sink_ptr& last = logger()->sinks().back();
  const auto early = std::dynamic_pointer_cast<EarlySink>(std::exchange(last, file_sink(chosen())));
  if (early == nullptr) return;
  for (const auto& message : early->last_raw()) last->log(message);
  last->flush();
}

void debug(std::string_view message) { write(level_enum::debug, message); }
void info(std::string_view message) { write(level_enum::info, message); }
void warn(std::string_view message) { write(level_enum::warn, message); }
void error(std::string_view message) { write(level_enum::err, message); }

}  // namespace graft::log
