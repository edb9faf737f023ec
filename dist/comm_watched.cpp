// Another Comm with every call watched: a Watchdog learns when the main thread enters and leaves
// it.
#include "dist/comm_factory.h"
#include "dist/watchdog.h"

namespace graft::dist {
namespace {

/// The main thread is inside a call while this lives.
class Call {
 public:
  Call(Watchdog& watchdog, const char* name, int collectives) : watchdog_(watchdog) {
    watchdog_.enter(name, collectives);
  }
  ~Call() { watchdog_.leave(); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  Watchdog& watchdog_;
};

class WatchedWork : public Work {
 public:
  WatchedWork(Watchdog& watchdog, std::unique_ptr<Work> work)
      : watchdog_(watchdog), work_(std::move(work)) {}
  ~WatchedWork() override {
    const Call call(watchdog_, "all_gather", 0);
    work_.reset();
  }
  void wait() override {
    const Call call(watchdog_, "all_gather", 0);
    work_->wait();
  }

 private:
  Watchdog& watchdog_;
  std::unique_ptr<Work> work_;
};

/// Passes every call on. Bytes are counted by this Comm; nobody reads what the inner one counts.
class WatchedComm : public Comm {
 public:
  WatchedComm(Watchdog& watchdog, std::unique_ptr<Comm> comm)
      : watchdog_(watchdog), comm_(std::move(comm)) {}

  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  void barrier() override {
    const Call call(watchdog_, "barrier", 1);
    comm_->barrier();
  }

 private:
  void do_all_reduce(at::Tensor& t) override {
    const Call call(watchdog_, "all_reduce", 1);
    comm_->all_reduce(t, Traffic::kControl);
  }
  std::unique_ptr<Work> do_all_gather(const at::Tensor& shard, at::Tensor& out,
                                      int64_t tag) override {
    const Call call(watchdog_, "all_gather", 1);
    return std::make_unique<WatchedWork>(watchdog_,
                                         comm_->all_gather(shard, out, Traffic::kControl, tag));
  }
  void do_all_to_all(const at::Tensor& in, at::Tensor& out) override {
    const Call call(watchdog_, "all_to_all", 1);
    comm_->all_to_all(in, out, Traffic::kControl);
  }
  void do_broadcast(at::Tensor& t, int root) override {
    const Call call(watchdog_, "broadcast", 1);
    comm_->broadcast(t, root, Traffic::kControl);
  }
  void do_send(const at::Tensor& t, int to) override {
    const Call call(watchdog_, "send", 0);
    comm_->send(t, to, Traffic::kControl);
  }
  void do_recv(at::Tensor& t, int from) override {
    const Call call(watchdog_, "recv", 0);
    comm_->recv(t, from, Traffic::kControl);
  }

  Watchdog& watchdog_;
  std::unique_ptr<Comm> comm_;
};

}  // namespace

std::unique_ptr<Comm> make_watched_comm(Watchdog& watchdog, std::unique_ptr<Comm> comm) {
  return std::make_unique<WatchedComm>(watchdog, std::move(comm));
}

}  // namespace graft::dist
