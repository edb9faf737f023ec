// CPU tensors over MPI, and the life of the library. MPI moves bytes; it adds only float32, float64
// and int64, whose sums every MPI defines. Errors come back as codes (MPI_ERRORS_RETURN) and leave
// as graft::Error.
#include <ATen/ATen.h>
#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <functional>
#include <utility>
#include <vector>

#include "configs/check.h"
#include "dist/comm_factory.h"

namespace graft::dist {
namespace {

void check(int status, const char* call) {
  if (status == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(status, text, &length);
  throw Error(ExitCode::kCommunication, detail::concat(call, " failed: ", text));
}

/// MPI counts in int: calls `transfer` with pieces of at most 1 GiB, in order.
void in_pieces(int64_t bytes, const std::function<void(int64_t offset, int count)>& transfer) {
  constexpr int64_t kPieceBytes = int64_t{1} << 30;
  for (int64_t offset = 0; offset < bytes; offset += kPieceBytes) {
    transfer(offset, static_cast<int>(std::min(kPieceBytes, bytes - offset)));
  }
}

int int_count(int64_t bytes, const char* call) {
  GRAFT_CHECK(bytes <= INT_MAX, ExitCode::kCommunication, call, ": one rank's part is ", bytes,
              " bytes, MPI takes at most ", INT_MAX, ": use more ranks");
  return static_cast<int>(bytes);
}

/// The datatype of a sum and its size.
std::pair<MPI_Datatype, int64_t> number_type(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return {MPI_FLOAT, 4};
    case at::kDouble:
      return {MPI_DOUBLE, 8};
    default:
      return {MPI_INT64_T, 8};
  }
}

char* data(at::Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }
const char* data(const at::Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }

/// A gather under way, ended by its destructor at the latest.
class GatherWork : public Work {
 public:
  GatherWork(MPI_Comm comm, const at::Tensor& shard, at::Tensor& out) : shard_(shard), out_(out) {
    const int count = int_count(shard.nbytes(), "all_gather");
    check(MPI_Iallgather(data(shard), count, MPI_BYTE, data(out), count, MPI_BYTE, comm, &request_),
          "MPI_Iallgather");
  }
  ~GatherWork() override { MPI_Wait(&request_, MPI_STATUS_IGNORE); }
  void wait() override { check(MPI_Wait(&request_, MPI_STATUS_IGNORE), "MPI_Wait"); }

 private:
  at::Tensor shard_, out_;  // kept alive for MPI, which moves most of the data inside wait()
  MPI_Request request_ = MPI_REQUEST_NULL;
};

class MpiComm : public Comm {
 public:
  explicit MpiComm(int color) {
    int world_rank = 0;
    check(MPI_Comm_rank(MPI_COMM_WORLD, &world_rank), "MPI_Comm_rank");
    check(MPI_Comm_split(MPI_COMM_WORLD, color, world_rank, &comm_), "MPI_Comm_split");
    check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    check(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
  }
  ~MpiComm() override { MPI_Comm_free(&comm_); }
  MpiComm(const MpiComm&) = delete;
  MpiComm& operator=(const MpiComm&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void barrier() override { check(MPI_Barrier(comm_), "MPI_Barrier"); }

 private:
  /// Before any data moves: Open MPI 4.1 writes past the buffer of a rank that expected less.
  void check_equal(const char* what, int64_t value) {
    std::vector<int64_t> values(size_);
    check(MPI_Allgather(&value, 1, MPI_INT64_T, values.data(), 1, MPI_INT64_T, comm_),
          "MPI_Allgather");
    check_in_step(what, values);
  }

  void do_all_reduce(at::Tensor& t) override {
    const auto [type, item_bytes] = number_type(t);
    in_pieces(t.nbytes(), [&, type = type, item_bytes = item_bytes](int64_t offset, int count) {
      check(MPI_Allreduce(MPI_IN_PLACE, data(t) + offset, static_cast<int>(count / item_bytes),
                          type, MPI_SUM, comm_),
            "MPI_Allreduce");
    });
  }

  std::unique_ptr<Work> do_all_gather(const at::Tensor& shard, at::Tensor& out,
                                      int64_t tag) override {
    check_equal("tags", tag);
    check_equal("sizes", static_cast<int64_t>(shard.nbytes()));
    return std::make_unique<GatherWork>(comm_, shard, out);
  }

  void do_all_to_all(const at::Tensor& in, at::Tensor& out) override {
    const int count = int_count(in.nbytes() / size_, "all_to_all");
    check(MPI_Alltoall(data(in), count, MPI_BYTE, data(out), count, MPI_BYTE, comm_),
          "MPI_Alltoall");
  }

  void do_broadcast(at::Tensor& t, int root) override {
    in_pieces(t.nbytes(), [&](int64_t offset, int count) {
      check(MPI_Bcast(data(t) + offset, count, MPI_BYTE, root, comm_), "MPI_Bcast");
    });
  }

  void do_send(const at::Tensor& t, int to) override {
    in_pieces(t.nbytes(), [&](int64_t offset, int count) {
      check(MPI_Send(data(t) + offset, count, MPI_BYTE, to, 0, comm_), "MPI_Send");
    });
  }

  void do_recv(at::Tensor& t, int from) override {
    in_pieces(t.nbytes(), [&](int64_t offset, int count) {
      MPI_Status status;
      check(MPI_Recv(data(t) + offset, count, MPI_BYTE, from, 0, comm_, &status), "MPI_Recv");
      int received = 0;
      check(MPI_Get_count(&status, MPI_BYTE, &received), "MPI_Get_count");
      GRAFT_ASSERT(received == count, "rank ", from, " sent ", received, " bytes, rank ", rank_,
                   " expected ", count);
    });
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace

MpiSession::MpiSession(int* argc, char*** argv) {
  int granted = MPI_THREAD_SINGLE;
  check(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &granted), "MPI_Init_thread");
  GRAFT_CHECK(granted >= MPI_THREAD_MULTIPLE, ExitCode::kCommunication,
              "this MPI library does not support threads (MPI_THREAD_MULTIPLE): use another build");
  for (MPI_Comm comm : {MPI_COMM_WORLD, MPI_COMM_SELF}) {
    check(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  }
}

MpiSession::~MpiSession() { MPI_Finalize(); }

int MpiSession::rank() const {
  int rank = 0;
  check(MPI_Comm_rank(MPI_COMM_WORLD, &rank), "MPI_Comm_rank");
  return rank;
}

int MpiSession::world() const {
  int size = 0;
  check(MPI_Comm_size(MPI_COMM_WORLD, &size), "MPI_Comm_size");
  return size;
}

void MpiSession::abort(ExitCode code) {
  alarm(10);  // the signal ends this process if MPI_Abort hangs
  MPI_Abort(MPI_COMM_WORLD, static_cast<int>(code));
  std::_Exit(static_cast<int>(code));  // if MPI_Abort comes back, this rank must not
}

std::unique_ptr<Comm> make_mpi_comm(int color) { return std::make_unique<MpiComm>(color); }

}  // namespace graft::dist
