// Makers of every Comm, and the life of the MPI library. Only launcher and tests include this
// header.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "configs/check.h"
#include "dist/comm.h"

namespace graft::dist {

class Watchdog;

/// MPI from initialisation to finalisation: one per process, made first and destroyed last, in
/// main() and outside its try block. After an error on this rank alone, call abort(): finalising
/// would wait for the other ranks.
class MpiSession {
 public:
  /// @throws graft::Error (kCommunication) if MPI does not start or grants less than
  /// MPI_THREAD_MULTIPLE, which the watchdog's thread needs
  MpiSession(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;

  int rank() const;   ///< in MPI_COMM_WORLD
  int world() const;  ///< ranks of MPI_COMM_WORLD
  /// Ends all ranks of the job; mpirun exits with `code`.
  [[noreturn]] void abort(ExitCode code);
};

/// A world of one: gathers are copies, everything else is nothing.
std::unique_ptr<Comm> make_single_comm();

/// CPU tensors over MPI. The ranks of MPI_COMM_WORLD that give the same `color` form a group, in
/// world order, with a communicator of its own. A tensor (for all_gather and all_to_all: a rank's
/// part of it) must stay below 2^31 bytes where MPI cannot take it in pieces, else an Error says
/// so. Needs a live MpiSession. Collective over the world.
std::unique_ptr<Comm> make_mpi_comm(int color = 0);

/// `comm` with every call watched. `watchdog` must outlive it.
std::unique_ptr<Comm> make_watched_comm(Watchdog& watchdog, std::unique_ptr<Comm> comm);

/// CUDA tensors over NCCL, for the ranks of `bootstrap`, which carries the NCCL id at the start and
/// the tags of all_gather later, so it must outlive this. Calls return when their work is queued
/// behind the current CUDA stream; all_gather runs on a stream of its own until wait(). Defined in
/// CUDA builds only. Ranks may share a GPU, with a warning; then it sets NCCL_HOSTID and, on one
/// machine, NCCL_SOCKET_IFNAME, unless they are set.
/// @param device    CUDA device of this rank
/// @param deadline  for each host-side phase (initialisation, enqueueing); then the communicator is
/// aborted and
///                  graft::Error (kCommunication) names the call
std::unique_ptr<Comm> make_nccl_comm(Comm& bootstrap, int device,
                                     std::chrono::milliseconds deadline);

/// Ranks as threads of one process, for tests and for rehearsing many ranks without mpirun: element
/// r is for thread r alone. Collectives of different kinds or sizes that meet are an Error (kBug);
/// a rank that does not come within `deadline` is an Error (kCommunication).
std::vector<std::unique_ptr<Comm>> make_virtual_comms(
    int world, std::chrono::milliseconds deadline = std::chrono::seconds(30));

/// Runs `body` as `world` virtual ranks and returns when all have ended. If ranks throw, the others
/// stop at their next collective, and the exception that came first is thrown here.
void run_virtual_ranks(int world, const std::function<void(Comm&)>& body,
                       std::chrono::milliseconds deadline = std::chrono::seconds(30));

}  // namespace graft::dist
