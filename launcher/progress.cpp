#include "launcher/progress.h"

#include <unistd.h>

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

std::string bar(double fraction) {
  constexpr int kWidth = 24;
  const int full = static_cast<int>(fraction * kWidth);
  return "[" + std::string(static_cast<size_t>(full), '=') +
         std::string(static_cast<size_t>(kWidth - full), ' ') + "]";
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
  if (!enabled || total <= 0 || (now - shown_ < pause && done < total)) return;
  const double fraction = static_cast<double>(done) / static_cast<double>(total);
  const double elapsed = std::chrono::duration<double>(now - start_).count();
  std::string line = what_ + " " + (terminal ? bar(fraction) + " " : "") +
                     std::to_string(static_cast<int>(fraction * 100)) + "%";
  if (!details.empty()) line += "  " + details;
  if (done > 0 && done < total)
    line += "  " + duration_text(elapsed / fraction - elapsed) + " left";
  // A quick job is not worth a line in a log.
  if (terminal) {
    std::fprintf(stderr, "\r\033[K%s", line.c_str());
  } else if (shown_ != Clock::time_point{} || !details.empty() || elapsed > 2) {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
  shown_ = now;
  drawn_ = terminal;
}

void Progress::finish() {
  if (drawn_) std::fprintf(stderr, "\r\033[K");
  drawn_ = false;
}

}  // namespace graft::launcher
