// Watchdog: no silent hang. A thread beside the main one sees how long the main thread waits inside
// one call of a Comm. Past the deadline it asks all ranks, over MPI, where they are, and reports
// whom the job waits for: a rank that does not answer (stopped, dead, cut off), else one that has
// not come to the collective, else ranks that wait for each other. Only waiting inside one call
// counts, so a section in which ranks compute, load or save for long needs no deadline of its own;
// neither does time in which this process itself was suspended. Nothing is sent while all is well.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "dist/comm.h"

namespace graft::dist {

class Watchdog {
 public:
  /// Told on the watchdog's thread of the lowest rank that waited too long: one sentence with the
  /// ranks, their hosts and the call. It should end the job; if it returns, the watch goes on.
  using Report = std::function<void(const std::string& verdict)>;

  /// Starts the watch. Needs a live MpiSession. Collective.
  /// @param world     all ranks of MPI_COMM_WORLD
  /// @param host      where this rank runs, for the verdict
  /// @param deadline  the longest that a rank may wait inside one call; the verdict takes at most
  ///                  four seconds more
  Watchdog(Comm& world, const std::string& host, std::chrono::milliseconds deadline, Report report);
  /// Waits, watched, until all ranks are here, because MPI could hang in its finalisation; unless
  /// an exception is leaving, for then the others do not come.
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// The main thread goes into `call`, which may wait for other ranks, and comes out of it.
  /// @param collectives  1 for a call that all ranks make, which is how ranks are compared; 0 for
  ///                     send, recv and the second half of a collective
  void enter(const char* call, int collectives);
  void leave();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace graft::dist
