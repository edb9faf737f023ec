// Comm: the collectives Graft needs, by interface. World of one, CPU tensors over MPI, CUDA tensors
// over NCCL, and threads of one process (tests). Every call is collective over the group and made
// by the main thread in the same order on every rank. The public calls check their arguments and
// count bytes, here and nowhere else; the back ends (comm_*.cpp, made by dist/comm_factory.h) only
// move them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace graft::dist {

/// What a transfer is for; metrics report the first two.
enum class Traffic { kGathered, kReduced, kControl };

/// A collective under way. wait() returns when its output may be read; the destructor waits too.
class Work {
 public:
  virtual ~Work() = default;
  virtual void wait() = 0;
};

/// All tensors are contiguous and live where the back end works: CPU, or CUDA for NCCL. W = size().
class Comm {
 public:
  virtual ~Comm() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  /// Sums `t` (float32, float64 or int64) in place over the ranks, in an order the library chooses.
  /// Counts 2 (W-1)/W of t's bytes: what no all-reduce without help from the network can go below.
  void all_reduce(at::Tensor& t, Traffic traffic);

  /// out[r] = rank r's shard. `out` has W times the bytes of `shard`. Started now, ended by wait();
  /// both tensors must live and be left alone until then. Counts W-1 times the bytes of `shard`.
  /// @param tag  must be equal on all ranks, and is compared, with the sizes, before data moves: a
  /// rank
  ///             that is out of step is an Error (kBug), never a wrong tensor
  std::unique_ptr<Work> all_gather(const at::Tensor& shard, at::Tensor& out, Traffic traffic,
                                   int64_t tag);

  /// Cuts `in` into W equal parts along dimension 0, sends part r to rank r; out[r] = the part from
  /// rank r. Counts (W-1)/W of the bytes of `in`.
  void all_to_all(const at::Tensor& in, at::Tensor& out, Traffic traffic);

  /// Counts the bytes of `t` on every rank but `root`.
  void broadcast(at::Tensor& t, int root, Traffic traffic);
  /// Counts nothing: only receivers count.
  void send(const at::Tensor& t, int to, Traffic traffic);
  /// Counts the bytes of `t`, which must equal what was sent.
  void recv(at::Tensor& t, int from, Traffic traffic);
  virtual void barrier() = 0;

  /// Bytes this rank received so far for `traffic`: payload, without tags and headers.
  int64_t bytes(Traffic traffic) const { return bytes_[static_cast<size_t>(traffic)]; }

 private:
  // What a back end provides. Arguments are checked; nothing is counted there.
  virtual void do_all_reduce(at::Tensor& t) = 0;
  virtual std::unique_ptr<Work> do_all_gather(const at::Tensor& shard, at::Tensor& out,
                                              int64_t tag) = 0;
  virtual void do_all_to_all(const at::Tensor& in, at::Tensor& out) = 0;
  virtual void do_broadcast(at::Tensor& t, int root) = 0;
  virtual void do_send(const at::Tensor& t, int to) = 0;
  virtual void do_recv(at::Tensor& t, int from) = 0;

  void count(Traffic traffic, int64_t bytes) { bytes_[static_cast<size_t>(traffic)] += bytes; }

  std::array<int64_t, 3> bytes_{};
};

/// For back ends: throws Error (kBug) unless `values`, the `what` of all ranks, are equal.
void check_in_step(const char* what, const std::vector<int64_t>& values);

// Control traffic over CPU tensors: any Comm but NCCL's.

/// Every rank gets `text` of `root`.
std::string broadcast_text(Comm& comm, const std::string& text, int root);
/// All ranks' texts, in rank order, on every rank.
std::vector<std::string> gather_texts(Comm& comm, const std::string& text);
/// True on every rank if `ok` is true on all: a local failure becomes everybody's decision.
bool agree(Comm& comm, bool ok);

}  // namespace graft::dist
