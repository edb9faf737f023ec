// Topology: which rank this process is, of how many, and where it runs. The only place in the
// project that reads environment variables. Launchers are known by the variables they set; two that
// disagree stop the run, because a wrong guess trains on the wrong rows or never meets the other
// ranks.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace graft::dist {

class Comm;

/// Looks up a variable: nothing if it is not set.
using Environment = std::function<std::optional<std::string>(const std::string&)>;
/// The environment of this process.
Environment process_environment();

struct Topology {
  static constexpr int kUnknown = -1;  ///< the launcher does not tell: place_on_nodes() finds out

  int rank = 0;
  int world = 1;
  int local_rank = kUnknown;   ///< among the ranks of this node: the device is this modulo the GPUs
                               ///< in CUDA_VISIBLE_DEVICES
  int local_world = kUnknown;  ///< ranks on this node
  int node = kUnknown;
  int num_nodes = kUnknown;
  std::string source;  ///< who said so: "torchrun", "Open MPI" ..., or "no launcher"
  std::string host;
};

/// Reads GRAFT_RANK, GRAFT_WORLD_SIZE, GRAFT_LOCAL_RANK, GRAFT_LOCAL_WORLD_SIZE (the explicit
/// choice), then torchrun's, Open MPI's, PMI's and Slurm's variables; without any, one rank. The
/// first source that speaks gives the name, later ones fill in what it leaves open and must agree
/// with it. Two exceptions, both normal inside a Slurm job: without a job step (a batch script, an
/// salloc shell) Slurm launched nothing; and a step with fewer tasks than MPI has ranks carries
/// mpirun's daemons.
/// @throws graft::Error (kUsage) naming the variable for a value that makes no sense, or both
/// sources that disagree
Topology detect_topology(const Environment& environment);

/// Checks that `world` (all ranks of the job) agrees with every rank's topology, and fills in nodes
/// and local ranks: as the launcher told, else by host name. Collective; all ranks return or all
/// throw.
/// @throws graft::Error (kUsage) if MPI counts ranks otherwise, or two ranks claim one place on a
/// node
void place_on_nodes(Topology& topology, Comm& world);

}  // namespace graft::dist
