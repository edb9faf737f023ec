// A world of one.
#include <ATen/ATen.h>

#include "dist/comm_factory.h"

namespace graft::dist {
namespace {

class NoWork : public Work {
 public:
  void wait() override {}
};

class SingleComm : public Comm {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  void barrier() override {}

 private:
  void do_all_reduce(at::Tensor&) override {}
  std::unique_ptr<Work> do_all_gather(const at::Tensor& shard, at::Tensor& out, int64_t) override {
    out.view(-1).copy_(shard.view(-1));
    return std::make_unique<NoWork>();
  }
  void do_all_to_all(const at::Tensor& in, at::Tensor& out) override {
    out.view(-1).copy_(in.view(-1));
  }
  void do_broadcast(at::Tensor&, int) override {}
  void do_send(const at::Tensor&, int) override {}  // unreachable: a rank never sends to itself
  void do_recv(at::Tensor&, int) override {}
};

}  // namespace

std::unique_ptr<Comm> make_single_comm() { return std::make_unique<SingleComm>(); }

}  // namespace graft::dist
