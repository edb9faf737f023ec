#include "launcher/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace graft::launcher {
namespace {

bool enabled = true;

std::string format(const char* pattern, double value, const char* unit) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value, unit);
  return text;
}

size_t terminal_columns() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/// "what [====  ] rest" within the terminal's width: the bar gives way first, then the line's end.
std::string with_bar(const std::string& what, double fraction, const std::string& rest) {
  constexpr size_t kWidest = 24, kNarrowest = 6;
  const size_t columns = terminal_columns() - 1;  // a full line would wrap
  const size_t others = what.size() + rest.size() + 4;
  const size_t width = std::min(kWidest, columns > others ? columns - others : 0);
  std::string line = what + " ";
  if (width >= kNarrowest) {
    const auto full = static_cast<size_t>(fraction * static_cast<double>(width));
    line += "[" + std::string(full, '=') + std::string(width - full, ' ') + "] ";
  }
  line += rest;
  size_t end = std::min(columns, line.size());
  while (end < line.size() && (line[end] & 0xC0) == 0x80) --end;  // not inside a character
  return line.substr(0, end);
}

}  // namespace

std::string duration_text(double seconds) {
  const auto s = static_cast<int64_t>(std::llround(seconds));
  if (s < 60) return std::to_string(s) + " s";
  if (s < 3600) return std::to_string(s / 60) + " min " + std::to_string(s % 60) + " s";
  return std::to_string(s / 3600) + " h " + std::to_string(s % 3600 / 60) + " min";
}

std::string bytes_text(int64_t bytes) {
  const auto b = static_cast<double>(bytes);
  if (bytes < 1 << 10) return std::to_string(bytes) + " B";
  if (bytes < 1 << 20) return format("%.1f %s", b / (1 << 10), "KiB");
  if (bytes < 1 << 30) return format("%.1f %s", b / (1 << 20), "MiB");
  return format("%.2f %s", b / (1 << 30), "GiB");
}

Progress::Progress(std::string what) : what_(std::move(what)) {}

void Progress::set_enabled(bool on) { enabled = on; }

void Progress::update(int64_t done, int64_t total) { update(done, total, ""); }

void Progress::update(int64_t done, int64_t total, const std::string& details) {
  const auto now = Clock::now();
  const bool terminal = isatty(STDERR_FILENO) == 1;
  const auto pause = terminal ? std::chrono::milliseconds(100) : std::chrono::milliseconds(5000);
  if (first_done_ < 0) first_done_ = done, first_update_ = now;
  if (!enabled || total <= 0 || (now - shown_ < pause && done < total)) return;
  const auto seconds_since = [now](Clock::time_point then) {
    return std::chrono::duration<double>(now - then).count();
  };
  // A quick job is not worth a line in a log.
  if (!terminal && details.empty() && seconds_since(start_) < 2) return;
  const double fraction = static_cast<double>(done) / static_cast<double>(total);
  std::string text = std::to_string(static_cast<int>(fraction * 100)) + "%";
  if (!details.empty()) text += "  " + details;
  if (done == total) {
    text += "  in " + duration_text(seconds_since(start_));
  } else if (done > first_done_) {
    const double each = seconds_since(first_update_) / static_cast<double>(done - first_done_);
    text += "  " + duration_text(each * static_cast<double>(total - done)) + " left";
  }
  if (terminal) {
    std::fprintf(stderr, "\r\033[K%s", with_bar(what_, fraction, text).c_str());
  } else {
    std::fprintf(stderr, "%s %s\n", what_.c_str(), text.c_str());
  }
  shown_ = now;
  drawn_ = terminal;
  stays_ = !details.empty();
}

void Progress::finish() {
  if (drawn_) std::fputs(stays_ ? "\n" : "\r\033[K", stderr);
  drawn_ = false;
}

}  // namespace graft::launcher
