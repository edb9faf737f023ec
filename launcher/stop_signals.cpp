#include "launcher/stop_signals.h"

#include <atomic>
#include <csignal>
#include <thread>

namespace graft::launcher {
namespace {

std::atomic<bool> requested = false, saves = false;

/// As if nobody watched: the process ends by the signal, and its parent sees which.
void end_by(int signal) {
  std::signal(signal, SIG_DFL);
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, signal);
  pthread_sigmask(SIG_UNBLOCK, &one, nullptr);
  std::raise(signal);
}

void wait_for(const sigset_t& signals) {
  for (int signal = 0; sigwait(&signals, &signal) == 0;) {
    if (signal == SIGINT && (!saves || requested)) end_by(signal);
    requested = true;
  }
}

}  // namespace

void watch_stop_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGUSR1, SIGUSR2, SIGTERM, SIGINT}) sigaddset(&signals, signal);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::thread(wait_for, signals).detach();
}

void save_before_stopping() { saves = true; }
bool stop_requested() { return requested; }

}  // namespace graft::launcher
