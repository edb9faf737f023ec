// Ranks as threads of one process. Each call is a meeting: every rank lays its offer on the table,
// all check that they came for the same call, read each other's tensors, and leave together.
#include <ATen/ATen.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "configs/check.h"
#include "dist/comm_factory.h"

namespace graft::dist {
namespace {

/// What a rank brings to a meeting.
struct Offer {
  const char* call = "";
  at::Tensor tensor;
  int64_t tag = 0;
};

class Group {
 public:
  Group(int size, std::chrono::milliseconds deadline) : offers(size), deadline_(deadline) {}

  /// Returns when all ranks have come.
  void meet(int rank, const char* call) {
    std::unique_lock lock(mutex_);
    const int64_t meeting = meetings_;
    if (++arrived_ == static_cast<int>(offers.size())) {
      arrived_ = 0;
      ++meetings_;
      changed_.notify_all();
      return;
    }
    await(lock, rank, call, [&] { return meetings_ != meeting; });
  }

  void post(int from, int to, at::Tensor parcel) {
    const std::lock_guard lock(mutex_);
    mail_[{from, to}].push_back(std::move(parcel));
    changed_.notify_all();
  }

  at::Tensor collect(int from, int to) {
    std::unique_lock lock(mutex_);
    std::deque<at::Tensor>& box = mail_[{from, to}];
    await(lock, to, "recv", [&] { return !box.empty(); });
    at::Tensor parcel = std::move(box.front());
    box.pop_front();
    return parcel;
  }

  /// A rank has failed: nobody waits for it any more. Keeps the first exception.
  void fail(std::exception_ptr why) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = why;
    changed_.notify_all();
  }
  std::exception_ptr failure() const { return failure_; }

  std::vector<Offer> offers;  // written by its rank before a meeting, read by all until the next

 private:
  template <class Ready>
  void await(std::unique_lock<std::mutex>& lock, int rank, const char* call, Ready ready) {
    const bool in_time = changed_.wait_for(lock, deadline_, [&] { return failure_ || ready(); });
    GRAFT_CHECK(in_time && ready(), ExitCode::kCommunication, "virtual rank ", rank, " in ", call,
                in_time ? ": another rank failed" : ": the other ranks did not come in time");
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::chrono::milliseconds deadline_;
  int arrived_ = 0;
  int64_t meetings_ = 0;
  std::map<std::pair<int, int>, std::deque<at::Tensor>> mail_;
  std::exception_ptr failure_;
};

const char* raw(const at::Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
char* raw(at::Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

void copy(char* to, const char* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // empty tensors have no address
}

/// Shows the gathered bytes only on wait(), as MPI does: code that reads too early must fail in
/// tests.
class StagedWork : public Work {
 public:
  StagedWork(at::Tensor staged, at::Tensor& out) : staged_(std::move(staged)), out_(out) {}
  void wait() override {
    if (!staged_.defined()) return;
    copy(raw(out_), raw(std::as_const(staged_)), staged_.nbytes());
    staged_.reset();
  }

 private:
  at::Tensor staged_, out_;
};

class VirtualComm : public Comm {
 public:
  VirtualComm(std::shared_ptr<Group> group, int rank) : group_(std::move(group)), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(group_->offers.size()); }
  void barrier() override {
    together({"barrier", {}, 0}, [](const std::vector<Offer>&) {});
  }

 private:
  /// Offers, waits for all, reads, waits until all have read.
  template <class Read>
  void together(const Offer& offer, Read read) {
    group_->offers[rank_] = offer;
    group_->meet(rank_, offer.call);
    const std::vector<Offer> offers = group_->offers;
    for (const Offer& other : offers) {
      GRAFT_ASSERT(std::strcmp(other.call, offer.call) == 0, "ranks are out of step: one calls ",
                   offer.call, ", another ", other.call);
    }
    read(offers);
    group_->meet(rank_, offer.call);
  }

  static void check_bytes(const std::vector<Offer>& offers) {
    for (const Offer& other : offers) {
      GRAFT_ASSERT(other.tensor.nbytes() == offers[0].tensor.nbytes(), "ranks bring ",
                   offers[0].tensor.nbytes(), " and ", other.tensor.nbytes(), " bytes to ",
                   other.call);
    }
  }

  void do_all_reduce(at::Tensor& t) override {
    at::Tensor sum;
    together({"all_reduce", t, 0}, [&](const std::vector<Offer>& offers) {
      check_bytes(offers);
      sum = offers[0].tensor.clone();
      for (size_t r = 1; r < offers.size(); ++r) sum.add_(offers[r].tensor);
    });
    t.copy_(sum);
  }

  std::unique_ptr<Work> do_all_gather(const at::Tensor& shard, at::Tensor& out,
                                      int64_t tag) override {
    at::Tensor staged = at::zeros_like(out);
    std::vector<int64_t> tags, sizes;
    together({"all_gather", shard, tag}, [&](const std::vector<Offer>& offers) {
      for (size_t r = 0; r < offers.size(); ++r) {
        tags.push_back(offers[r].tag);
        sizes.push_back(static_cast<int64_t>(offers[r].tensor.nbytes()));
        const size_t bytes = std::min(shard.nbytes(), offers[r].tensor.nbytes());
        copy(raw(staged) + r * shard.nbytes(), raw(offers[r].tensor), bytes);
      }
    });
    check_in_step("tags", tags);  // after the meeting: nobody leaves while others read
    check_in_step("sizes", sizes);
    return std::make_unique<StagedWork>(std::move(staged), out);
  }

  void do_all_to_all(const at::Tensor& in, at::Tensor& out) override {
    together({"all_to_all", in, 0}, [&](const std::vector<Offer>& offers) {
      check_bytes(offers);
      const size_t part = in.nbytes() / offers.size();
      for (size_t r = 0; r < offers.size(); ++r) {
        copy(raw(out) + r * part, raw(offers[r].tensor) + rank_ * part, part);
      }
    });
  }

  void do_broadcast(at::Tensor& t, int root) override {
    together({"broadcast", t, 0}, [&](const std::vector<Offer>& offers) {
      check_bytes(offers);
      if (rank_ != root) copy(raw(t), raw(offers[root].tensor), t.nbytes());
    });
  }

  void do_send(const at::Tensor& t, int to) override { group_->post(rank_, to, t.clone()); }

  void do_recv(at::Tensor& t, int from) override {
    const at::Tensor parcel = group_->collect(from, rank_);
    GRAFT_ASSERT(parcel.nbytes() == t.nbytes(), "rank ", from, " sent ", parcel.nbytes(),
                 " bytes, rank ", rank_, " expected ", t.nbytes());
    copy(raw(t), raw(parcel), t.nbytes());
  }

  std::shared_ptr<Group> group_;
  int rank_;
};

std::vector<std::unique_ptr<Comm>> members(const std::shared_ptr<Group>& group) {
  std::vector<std::unique_ptr<Comm>> comms;
  for (size_t r = 0; r < group->offers.size(); ++r) {
    comms.push_back(std::make_unique<VirtualComm>(group, static_cast<int>(r)));
  }
  return comms;
}

}  // namespace

std::vector<std::unique_ptr<Comm>> make_virtual_comms(int world,
                                                      std::chrono::milliseconds deadline) {
  return members(std::make_shared<Group>(world, deadline));
}

void run_virtual_ranks(int world, const std::function<void(Comm&)>& body,
                       std::chrono::milliseconds deadline) {
  const auto group = std::make_shared<Group>(world, deadline);
  std::vector<std::thread> threads;
  for (std::unique_ptr<Comm>& member : members(group)) {
    threads.emplace_back([&group, &body, comm = std::move(member)] {
      try {
        body(*comm);
      } catch (...) {
        group->fail(std::current_exception());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (group->failure()) std::rethrow_exception(group->failure());
}

}  // namespace graft::dist
