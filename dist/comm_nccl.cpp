// CUDA tensors over NCCL. The communicator is non-blocking: every call may answer "in progress" and
// is polled until a deadline, after which the communicator is aborted, so a dead peer is an error
// and not a hang. Collectives run on a stream of their own, ordered behind and before the caller's
// stream by events.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>

#include "configs/check.h"
#include "configs/log.h"
#include "dist/comm_factory.h"
#include "kernels/device.h"

namespace graft::dist {
namespace {

using c10::cuda::CUDAEvent;
using c10::cuda::CUDAStream;
using Clock = std::chrono::steady_clock;

ncclDataType_t number_type(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return ncclFloat32;
    case at::kDouble:
      return ncclFloat64;
    default:
      return ncclInt64;
  }
}

char* data(at::Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }
const char* data(const at::Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

/// NCCL refuses one GPU to two ranks of a host. Where ranks share one, each is a host of its own to
/// NCCL, and where all are on one machine their network is its loopback. NCCL reads both variables
/// once, at its first call; what the user has set stays. Collective.
void let_ranks_share_gpus(Comm& bootstrap, int device) {
  char host[256] = {}, bus[32] = {};
  gethostname(host, sizeof host - 1);
  CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, device));
  const std::string machine = host + std::string(" ");
  const std::vector<std::string> gpus = gather_texts(bootstrap, machine + bus);
  const std::set<std::string> distinct(gpus.begin(), gpus.end());
  if (distinct.size() == gpus.size()) return;
  if (bootstrap.rank() == 0) {
    log::warn(detail::concat(gpus.size(), " ranks share ", distinct.size(),
                             " GPU(s): that shows correctness, not speed"));
  }
  constexpr int kUsersStays = 0;
  setenv("NCCL_HOSTID", (host + std::to_string(bootstrap.rank())).c_str(), kUsersStays);
  const bool one_machine = std::all_of(
      gpus.begin(), gpus.end(), [&](const std::string& gpu) { return gpu.starts_with(machine); });
  if (one_machine) setenv("NCCL_SOCKET_IFNAME", "lo", kUsersStays);
}

/// The id that rank 0 makes, on every rank; a failure there becomes the same error everywhere.
ncclUniqueId share_id(Comm& bootstrap) {
  ncclUniqueId id = {};
  ncclResult_t status = ncclSuccess;
  if (bootstrap.rank() == 0) status = ncclGetUniqueId(&id);
  at::Tensor message = at::zeros({1 + static_cast<int64_t>(sizeof id)}, at::kByte);
  data(message)[0] = static_cast<char>(status);
  std::memcpy(data(message) + 1, &id, sizeof id);
  bootstrap.broadcast(message, 0, Traffic::kControl);
  NCCL_CHECK(static_cast<ncclResult_t>(data(message)[0]));
  std::memcpy(&id, data(message) + 1, sizeof id);
  return id;
}

/// A gather on the communication stream; wait() puts the caller's stream behind it, the host goes
/// on.
class GatherWork : public Work {
 public:
  GatherWork(const at::Tensor& shard, const at::Tensor& out, CUDAEvent done)
      : shard_(shard), out_(out), done_(std::move(done)) {}
  ~GatherWork() override { order(); }
  void wait() override { order(); }

 private:
  void order() { done_.block(c10::cuda::getCurrentCUDAStream(done_.device_index())); }

  at::Tensor shard_, out_;  // not reused before the caller's stream is behind the gather
  CUDAEvent done_;
};

class NcclComm : public Comm {
 public:
  NcclComm(Comm& bootstrap, int device, std::chrono::milliseconds deadline)
      : bootstrap_(bootstrap),
        device_(device),
        deadline_(deadline),
        stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device)) {
    const c10::cuda::CUDAGuard guard(device_);
    let_ranks_share_gpus(bootstrap, device);
    const ncclUniqueId id = share_id(bootstrap);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    finish(ncclCommInitRankConfig(&comm_, size(), id, rank(), &config), "ncclCommInitRankConfig");
  }

  ~NcclComm() override {
    if (comm_ == nullptr) return;
    const c10::cuda::CUDAGuard guard(device_);
    const ncclResult_t status = ncclCommFinalize(comm_);  // waits for what is queued
    if (status == ncclSuccess || settled() == ncclSuccess) {
      ncclCommDestroy(comm_);
    } else {
      ncclCommAbort(comm_);
    }
  }
  NcclComm(const NcclComm&) = delete;
  NcclComm& operator=(const NcclComm&) = delete;

  int rank() const override { return bootstrap_.rank(); }
  int size() const override { return bootstrap_.size(); }

  /// Of the hosts, after this rank's queued work is done.
  void barrier() override {
    CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream(device_).stream()));
    bootstrap_.barrier();
  }

 private:
  /// Polls until NCCL is no longer "in progress" or the deadline has passed; the last state.
  ncclResult_t settled() {
    ncclResult_t state = ncclInProgress;
    const Clock::time_point end = Clock::now() + deadline_;
    while (Clock::now() < end) {
      if (ncclCommGetAsyncError(comm_, &state) != ncclSuccess || state != ncclInProgress) break;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return state;
  }

  /// Ends a host-side phase; aborts the communicator and throws if it failed or took too long.
  void finish(ncclResult_t status, const char* call) {
    if (status == ncclInProgress) status = settled();
    if (status == ncclSuccess) return;
    const std::string reason = status == ncclInProgress
                                   ? detail::concat("no answer in ", deadline_.count(), " ms")
                                   : ncclGetErrorString(status);
    const std::string detail = comm_ ? ncclGetLastError(comm_) : "";
    if (comm_ != nullptr) ncclCommAbort(comm_);
    comm_ = nullptr;
    throw Error(ExitCode::kCommunication,
                detail::concat(call, " failed on rank ", rank(), ": ", reason, " ", detail));
  }

  /// Runs `enqueue(stream)` on the communication stream behind the caller's work; the event marks
  /// its end.
  template <class Enqueue>
  CUDAEvent launch(const char* call, Enqueue enqueue) {
    GRAFT_CHECK(comm_ != nullptr, ExitCode::kCommunication, call,
                " on a communicator that was aborted");
    const c10::cuda::CUDAGuard guard(device_);
    CUDAEvent ready, done;
    ready.record(c10::cuda::getCurrentCUDAStream(device_));
    ready.block(stream_);
    finish(enqueue(stream_.stream()), call);
    done.record(stream_);
    return done;
  }

  /// launch(), with the caller's stream behind it.
  template <class Enqueue>
  void run(const char* call, Enqueue enqueue) {
    launch(call, enqueue).block(c10::cuda::getCurrentCUDAStream(device_));
  }

  void do_all_reduce(at::Tensor& t) override {
    run("ncclAllReduce", [&](cudaStream_t stream) {
      return ncclAllReduce(data(t), data(t), t.numel(), number_type(t), ncclSum, comm_, stream);
    });
  }

  std::unique_ptr<Work> do_all_gather(const at::Tensor& shard, at::Tensor& out,
                                      int64_t tag) override {
    // The bootstrap compares the tags. Hosts run ahead of devices, so this meeting costs no device
    // time.
    const auto bytes = static_cast<int64_t>(shard.nbytes());
    at::Tensor sizes = at::empty({size()}, at::kLong);
    bootstrap_.all_gather(at::full({1}, bytes, at::kLong), sizes, Traffic::kControl, tag)->wait();
    const int64_t* first = sizes.const_data_ptr<int64_t>();
    check_in_step("sizes", {first, first + size()});
    CUDAEvent done = launch("ncclAllGather", [&](cudaStream_t stream) {
      return ncclAllGather(data(shard), data(out), bytes, ncclUint8, comm_, stream);
    });
    return std::make_unique<GatherWork>(shard, out, std::move(done));
  }

  void do_all_to_all(const at::Tensor& in, at::Tensor& out) override {
    const size_t part = in.nbytes() / size();
    run("all_to_all by ncclSend and ncclRecv", [&](cudaStream_t stream) {
      NCCL_CHECK(ncclGroupStart());
      for (int r = 0; r < size(); ++r) {
        NCCL_CHECK(ncclSend(data(in) + r * part, part, ncclUint8, r, comm_, stream));
        NCCL_CHECK(ncclRecv(data(out) + r * part, part, ncclUint8, r, comm_, stream));
      }
      return ncclGroupEnd();
    });
  }

  void do_broadcast(at::Tensor& t, int root) override {
    run("ncclBroadcast", [&](cudaStream_t stream) {
      return ncclBroadcast(data(t), data(t), t.nbytes(), ncclUint8, root, comm_, stream);
    });
  }

  void do_send(const at::Tensor& t, int to) override {
    run("ncclSend", [&](cudaStream_t stream) {
      return ncclSend(data(t), t.nbytes(), ncclUint8, to, comm_, stream);
    });
  }

  void do_recv(at::Tensor& t, int from) override {
    run("ncclRecv", [&](cudaStream_t stream) {
      return ncclRecv(data(t), t.nbytes(), ncclUint8, from, comm_, stream);
    });
  }

  Comm& bootstrap_;
  c10::DeviceIndex device_;
  std::chrono::milliseconds deadline_;
  CUDAStream stream_;
  ncclComm_t comm_ = nullptr;
};

}  // namespace

std::unique_ptr<Comm> make_nccl_comm(Comm& bootstrap, int device,
                                     std::chrono::milliseconds deadline) {
  return std::make_unique<NcclComm>(bootstrap, device, deadline);
}

}  // namespace graft::dist
