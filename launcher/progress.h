// Progress: one changing line on a terminal, one plain line every few seconds in a file; rank 0
// only.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace graft::launcher {

/// "1 min 5 s", "12 s".
std::string duration_text(double seconds);
/// "1.2 GiB".
std::string bytes_text(int64_t bytes);

class Progress {
 public:
  explicit Progress(std::string what);
  ~Progress() { finish(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void update(int64_t done, int64_t total);
  /// The same, with text of the caller's between the bar and the time left.
  void update(int64_t done, int64_t total, const std::string& details);
  /// Ends the line: one with details stays on the terminal, any other is wiped off.
  void finish();

  static void set_enabled(bool enabled);  ///< off on ranks other than 0

 private:
  using Clock = std::chrono::steady_clock;
  std::string what_;
  Clock::time_point start_ = Clock::now(), first_update_{}, shown_{};
  int64_t first_done_ = -1;  ///< at the first update: a resumed run does not begin at 0
  bool drawn_ = false, stays_ = false;
};

}  // namespace graft::launcher
