// Watchdog between processes: run by mpirun with 3 ranks of one machine. Rank 1 keeps the others
// waiting in each way there is, and whoever reports it helps it on, so that the test goes on.
#include "dist/watchdog.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dist/comm_factory.h"

namespace graft::dist {
namespace {

using namespace std::chrono_literals;  // NOLINT

/// All ranks under a watchdog; `help` runs where and when it reports.
class Watched {
 public:
  explicit Watched(
      std::chrono::milliseconds deadline, std::function<void()> help = [] {})
      : control_(make_mpi_comm()),
        watchdog_(*control_, "box" + std::to_string(control_->rank()), deadline,
                  [this, help = std::move(help)](const std::string& verdict) {
                    verdict_ += verdict;
                    help();
                  }) {
    auto comm = make_mpi_comm();
    unwatched_ = comm.get();
    comm_ = make_watched_comm(watchdog_, std::move(comm));
  }

  Comm& comm() { return *comm_; }
  /// What comm() passes its calls on to.
  Comm& unwatched() { return *unwatched_; }

  /// What all ranks reported. Collective, once nobody waits any more.
  std::string verdict() {
    std::string all;
    for (const std::string& text : gather_texts(*control_, verdict_)) all += text;
    return all;
  }

 private:
  std::unique_ptr<Comm> control_;
  std::string verdict_;  // written while the main thread is inside a call, read outside of any
  Watchdog watchdog_;
  Comm* unwatched_ = nullptr;
  std::unique_ptr<Comm> comm_;
};

std::vector<pid_t> pids_of_ranks() {
  std::vector<pid_t> pids;
  for (const std::string& text : gather_texts(*make_mpi_comm(), std::to_string(getpid()))) {
    pids.push_back(static_cast<pid_t>(std::stol(text)));
  }
  return pids;
}

TEST(Watchdog, NamesAStoppedRankAndItsHost) {
  const std::vector<pid_t> pids = pids_of_ranks();
  Watched job(1s, [&] { kill(pids[1], SIGCONT); });
  if (job.comm().rank() == 1) kill(getpid(), SIGSTOP);
  job.comm().barrier();
  EXPECT_EQ(job.verdict(),
            "rank 1 (host box1) did not come to barrier at collective 1 within 1 s: no answer, so "
            "it is stopped or dead, or its machine cannot be reached");
}

TEST(Watchdog, TellsARankThatIsBusyFromOneThatIsGone) {
  Watched job(1s);
  at::Tensor t = at::ones({3});
  job.comm().all_reduce(t, Traffic::kControl);
  if (job.comm().rank() == 1) std::this_thread::sleep_for(6s);
  job.comm().broadcast(t, 1, Traffic::kControl);
  EXPECT_EQ(job.verdict(),
            "rank 1 (host box1, last seen in all_reduce at collective 1) did not come to broadcast "
            "at collective 2 within 1 s: it is alive, but stuck or slow outside of communication");
}

TEST(Watchdog, NamesTheRankBehindWhereAllWait) {
  // Rank 0 wants a message that rank 1 sends after a barrier; the help takes rank 0's part in it.
  Watched job(1s, [&] { job.unwatched().barrier(); });
  at::Tensor t = at::ones({1});
  if (job.comm().rank() == 0) {
    job.comm().recv(t, 1, Traffic::kControl);
  } else {
    job.comm().barrier();
    if (job.comm().rank() == 1) job.comm().send(t, 0, Traffic::kControl);
  }
  EXPECT_EQ(job.verdict(),
            "all ranks wait for each other, none goes on within 1 s; furthest behind rank 0 (host "
            "box0, last seen in recv at collective 0); rank 0 waits in recv at collective 0");
}

TEST(Watchdog, ARankThatWasStoppedItselfBlamesNobody) {
  const std::vector<pid_t> pids = pids_of_ranks();
  Watched job(7s);
  if (job.comm().rank() == 1) {
    std::this_thread::sleep_for(500ms);  // the others wait by now
    kill(pids[0], SIGSTOP), kill(pids[2], SIGSTOP);
    std::this_thread::sleep_for(8s);
    kill(pids[0], SIGCONT), kill(pids[2], SIGCONT);
    std::this_thread::sleep_for(4s);  // longer than a watchdog needs to ask around
  }
  job.comm().barrier();
  EXPECT_EQ(job.verdict(), "");
}

}  // namespace
}  // namespace graft::dist
