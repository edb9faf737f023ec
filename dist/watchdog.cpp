// Two threads share a RankPlace behind a mutex: the main one writes where it is, the watchdog's
// reads it, answers questions and asks. Results of MPI calls are not checked here: what fails to
// reach a rank leaves it silent, and a silent rank is what the verdict is about.
#include "dist/watchdog.h"

#include <mpi.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "configs/check.h"

namespace graft::dist {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kTick{100};
constexpr milliseconds kLongestTick{1000};  // more went by: this process was suspended, not waiting
constexpr milliseconds kGrace{3000};        // for answers; a rank's watchdog answers within a tick
constexpr milliseconds kPause{10'000};      // before the same wait is looked into again
constexpr size_t kMostNamed = 8;

enum Tag { kQuestion, kAnswer };

/// Where the main thread of a rank is. Ranks send it as bytes.
struct RankPlace {
  int64_t round = 0;   ///< of the question that this answers
  int64_t number = 0;  ///< collectives entered so far; all ranks make the same ones, in one order
  int32_t waits = 0;   ///< whether inside a call
  char call[20] = "the start";
};
using RankPlaces = std::vector<std::optional<RankPlace>>;  // by rank; nothing: no answer

std::string describe(const RankPlace& place) {
  return detail::concat(place.call, " at collective ", place.number);
}

}  // namespace

struct Watchdog::Impl {
  /// The life of the thread.
  void watch() {
    Clock::time_point last = Clock::now();
    Clock::duration waited{0};
    int64_t call = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex);
        if (wake.wait_for(lock, kTick, [&] { return stop; })) return;
        const Clock::time_point now = Clock::now();
        const bool still = place.waits && num_calls == std::exchange(call, num_calls);
        const auto tick = std::min<Clock::duration>(now - std::exchange(last, now), kLongestTick);
        waited = still ? waited + tick : Clock::duration(0);
      }
      answer_questions();
      if (waited < deadline) continue;
      investigate(call);
      waited -= kPause;
    }
  }

  void answer_questions() {
    for (;;) {
      int found = 0;
      MPI_Status status;
      MPI_Iprobe(MPI_ANY_SOURCE, kQuestion, channel, &found, &status);
      if (!found) return;
      const int asker = status.MPI_SOURCE;
      RankPlace answer = here();
      MPI_Recv(&answer.round, 1, MPI_INT64_T, asker, kQuestion, channel, MPI_STATUS_IGNORE);
      MPI_Send(&answer, sizeof answer, MPI_BYTE, asker, kAnswer, channel);
      if (asker < rank) asked_from_below = Clock::now();
    }
  }

  void collect_answers(RankPlaces& places) {
    for (;;) {
      int found = 0;
      MPI_Status status;
      MPI_Iprobe(MPI_ANY_SOURCE, kAnswer, channel, &found, &status);
      if (!found) return;
      RankPlace place;
      MPI_Recv(&place, sizeof place, MPI_BYTE, status.MPI_SOURCE, kAnswer, channel,
               MPI_STATUS_IGNORE);
      if (place.round == rounds.back()) places[status.MPI_SOURCE] = place;
    }
  }

  /// Asks everybody and reports; unless the wait ends meanwhile, or a rank below has asked too, for
  /// then it waits for the same and reports.
  void investigate(int64_t call) {
    rounds.push_back(static_cast<int64_t>(rounds.size()));
    for (int r = 0; r < size; ++r) {
      if (r == rank) continue;
      MPI_Request request;  // nobody waits for it: the receiver may never come
      MPI_Isend(&rounds.back(), 1, MPI_INT64_T, r, kQuestion, channel, &request);
      MPI_Request_free(&request);
    }
    RankPlaces places(size);
    for (const auto end = Clock::now() + kGrace; Clock::now() < end;) {
      std::this_thread::sleep_for(kTick);
      answer_questions();
      collect_answers(places);
    }
    {
      const std::lock_guard lock(mutex);
      if (!place.waits || num_calls != call) return;
      places[rank] = place;
    }
    if (Clock::now() - asked_from_below > kPause) report(verdict(places));
  }

  RankPlace here() {
    const std::lock_guard lock(mutex);
    return place;
  }

  std::string verdict(const RankPlaces& places) const {
    const RankPlace& mine = *places[rank];
    const std::string wait =
        detail::concat(" within ", std::chrono::duration<double>(deadline).count(), " s");
    const std::string awaited = detail::concat(" did not come to ", describe(mine), wait, ": ");
    const auto is_silent = [&](int r) { return !places[r]; };
    if (const std::string names = names_of(is_silent, {}); !names.empty()) {
      return names + awaited +
             "no answer, so it is stopped or dead, or its machine cannot be reached";
    }
    int64_t lowest = mine.number;
    for (const auto& place : places) lowest = std::min(lowest, place->number);
    const auto is_last = [&](int r) { return places[r]->number == lowest; };
    const auto is_busy = [&](int r) { return is_last(r) && !places[r]->waits; };
    if (const std::string names = names_of(is_busy, places); !names.empty()) {
      return names + awaited + "it is alive, but stuck or slow outside of communication";
    }
    return detail::concat("all ranks wait for each other, none goes on", wait, "; furthest behind ",
                          names_of(is_last, places), "; rank ", rank, " waits in ", describe(mine));
  }

  /// "rank 1 (host a, in all_gather ...), rank 2 ..." of the ranks that `match`.
  template <class Match>
  std::string names_of(Match match, const RankPlaces& places) const {
    std::string names;
    size_t count = 0;
    for (int r = 0; r < size; ++r) {
      if (!match(r) || ++count > kMostNamed) continue;
      names += detail::concat(names.empty() ? "" : ", ", "rank ", r, " (host ", hosts[r],
                              places.empty() ? "" : ", last seen in " + describe(*places[r]), ")");
    }
    return count > kMostNamed ? detail::concat(names, " and ", count - kMostNamed, " more") : names;
  }

  MPI_Comm channel = MPI_COMM_NULL;  // for questions and answers alone
  int rank = 0;
  int size = 1;
  std::vector<std::string> hosts;  // by rank
  Clock::duration deadline{};
  Report report;

  std::mutex mutex;  // guards the next four
  std::condition_variable wake;
  bool stop = false;
  RankPlace place;
  int64_t num_calls = 0;

  Clock::time_point asked_from_below;  // when a lower rank last did
  std::list<int64_t> rounds;  // one a question; kept, for a send to a stopped rank never ends
  std::thread thread;
};

Watchdog::Watchdog(Comm& world, const std::string& host, milliseconds deadline, Report report)
    : impl_(new Impl) {
  impl_->rank = world.rank();
  impl_->size = world.size();
  impl_->hosts = gather_texts(world, host);
  impl_->deadline = deadline;
  impl_->report = std::move(report);
  MPI_Comm_dup(MPI_COMM_WORLD, &impl_->channel);
  impl_->thread = std::thread([impl = impl_.get()] { impl->watch(); });
}

Watchdog::~Watchdog() {
  if (std::uncaught_exceptions() == 0) {
    enter("the end", 1);
    MPI_Barrier(impl_->channel);
    leave();
  }
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->stop = true;
  }
  impl_->wake.notify_all();
  impl_->thread.join();
  MPI_Comm_free(&impl_->channel);
}

void Watchdog::enter(const char* call, int collectives) {
  const std::lock_guard lock(impl_->mutex);
  RankPlace& place = impl_->place;
  place.call[std::string_view(call).copy(place.call, sizeof place.call - 1)] = 0;
  place.number += collectives;
  place.waits = 1;
  ++impl_->num_calls;
}

void Watchdog::leave() {
  const std::lock_guard lock(impl_->mutex);
  impl_->place.waits = 0;
}

}  // namespace graft::dist
