#include "dist/topology.h"

#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <set>
#include <sstream>
#include <vector>

#include "configs/check.h"
#include "dist/comm.h"

namespace graft::dist {
namespace {

constexpr int kUnknown = Topology::kUnknown;

/// One launcher's variables; nullptr where it has none.
struct Launcher {
  const char* name;
  const char* rank;
  const char* world;
  const char* local_rank;
  const char* local_world;
  const char* node;
  const char* num_nodes;
};

// In order of precedence. srun alone sets SLURM_STEP_NUM_TASKS; salloc and sbatch set SLURM_NTASKS
// too.
// clang-format off
constexpr Launcher kExplicit = {"the explicit choice", "GRAFT_RANK", "GRAFT_WORLD_SIZE",
                                "GRAFT_LOCAL_RANK", "GRAFT_LOCAL_WORLD_SIZE", nullptr, nullptr};
constexpr Launcher kTorchrun = {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
                                "GROUP_RANK", "GROUP_WORLD_SIZE"};
constexpr Launcher kOpenMpi = {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                               "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
                               nullptr, nullptr};
constexpr Launcher kPmi = {"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
                           nullptr, nullptr};
constexpr Launcher kSlurmStep = {"Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
                                 nullptr, "SLURM_NODEID", "SLURM_STEP_NUM_NODES"};
constexpr Launcher kSlurm = {"Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
                             nullptr, "SLURM_NODEID", "SLURM_NNODES"};
// clang-format on

int read_number(const Environment& environment, const char* name) {
  if (name == nullptr) return kUnknown;
  const std::optional<std::string> text = environment(name);
  if (!text) return kUnknown;
  int value = 0;
  const char* end = text->data() + text->size();
  const auto [stop, error] = std::from_chars(text->data(), end, value);
  GRAFT_CHECK(error == std::errc() && stop == end && value >= 0, "environment variable ", name,
              "='", *text, "' is not a whole number from 0: fix or unset it");
  return value;
}

void check_below(const Launcher& launcher, const char* name, int value, const char* bound_name,
                 int bound) {
  GRAFT_CHECK(value == kUnknown || bound == kUnknown || value < bound, launcher.name, ": ", name,
              "=", value, " must be below ", bound_name, "=", bound);
}

/// What a launcher says, or nothing if it did not start this process.
std::optional<Topology> read_claim(const Environment& environment, const Launcher& launcher) {
  Topology claim;
  claim.rank = read_number(environment, launcher.rank);
  claim.world = read_number(environment, launcher.world);
  if (claim.rank == kUnknown && claim.world == kUnknown) return std::nullopt;
  GRAFT_CHECK(claim.rank != kUnknown && claim.world != kUnknown, "environment variable ",
              claim.rank == kUnknown ? launcher.world : launcher.rank, " is set but ",
              claim.rank == kUnknown ? launcher.rank : launcher.world,
              " is not: a launcher sets both");
  claim.local_rank = read_number(environment, launcher.local_rank);
  claim.local_world = read_number(environment, launcher.local_world);
  claim.node = read_number(environment, launcher.node);
  claim.num_nodes = read_number(environment, launcher.num_nodes);
  check_below(launcher, launcher.rank, claim.rank, launcher.world, claim.world);
  check_below(launcher, launcher.local_rank, claim.local_rank,
              claim.local_world == kUnknown ? launcher.world : launcher.local_world,
              claim.local_world == kUnknown ? claim.world : claim.local_world);
  check_below(launcher, launcher.node, claim.node, launcher.num_nodes, claim.num_nodes);
  GRAFT_CHECK(claim.local_world == kUnknown || claim.local_world <= claim.world, launcher.name,
              ": ", launcher.local_world, "=", claim.local_world, " exceeds ", launcher.world, "=",
              claim.world);
  claim.source = launcher.name;
  return claim;
}

std::optional<Topology> read_slurm(const Environment& environment) {
  const bool in_step = environment("SLURM_STEP_ID") || environment("SLURM_STEPID");
  if (!in_step || !environment("SLURM_PROCID")) return std::nullopt;
  return read_claim(environment, environment("SLURM_STEP_NUM_TASKS") ? kSlurmStep : kSlurm);
}

std::string describe(const Topology& t) {
  std::ostringstream out;
  out << t.source << " says rank " << t.rank << " of " << t.world;
  if (t.local_rank != kUnknown) out << ", local rank " << t.local_rank;
  if (t.local_world != kUnknown) out << ", " << t.local_world << " on this node";
  if (t.node != kUnknown) out << ", node " << t.node;
  if (t.num_nodes != kUnknown) out << ", " << t.num_nodes << " nodes";
  return out.str();
}

/// Takes from `claim` what `known` leaves open; the rest must be equal.
void merge(Topology& known, const Topology& claim) {
  const Topology before = known;
  for (int Topology::*field : {&Topology::rank, &Topology::world, &Topology::local_rank,
                               &Topology::local_world, &Topology::node, &Topology::num_nodes}) {
    if (known.*field == kUnknown) known.*field = claim.*field;
    GRAFT_CHECK(claim.*field == kUnknown || known.*field == claim.*field,
                "two launchers disagree: ", describe(before), "; ", describe(claim),
                ". Unset the variables of the one that did not start this job");
  }
}

/// PMIx tells the rank alone, so it can only confirm.
void check_pmix(const Environment& environment, const Topology& known) {
  const int rank = read_number(environment, "PMIX_RANK");
  GRAFT_CHECK(rank == kUnknown || rank == known.rank || known.source.empty(),
              "two launchers disagree: ", describe(known), "; PMIx says rank ", rank,
              " (PMIX_RANK). Unset the variables of the one that did not start this job");
}

std::string host_name(const Environment& environment) {
  for (const char* name : {"PMIX_HOSTNAME", "SLURMD_NODENAME"}) {
    if (const auto host = environment(name); host && !host->empty()) return *host;
  }
  char buffer[256] = {};
  gethostname(buffer, sizeof buffer - 1);
  return buffer;
}

/// One rank's line of the exchange in place_on_nodes(); the host comes last, it may hold anything.
struct NodePlace {
  int rank, world, local_rank, local_world, node;
  std::string source, host;
};

std::string to_line(const Topology& t) {
  std::ostringstream out;
  out << t.rank << ' ' << t.world << ' ' << t.local_rank << ' ' << t.local_world << ' ' << t.node
      << '\n'
      << t.source << '\n'
      << t.host;
  return out.str();
}

NodePlace from_line(const std::string& line) {
  std::istringstream in(line);
  NodePlace p;
  in >> p.rank >> p.world >> p.local_rank >> p.local_world >> p.node;
  in.ignore();
  std::getline(in, p.source);
  std::getline(in, p.host);
  return p;
}

}  // namespace

Environment process_environment() {
  return [](const std::string& name) -> std::optional<std::string> {
    const char* value = std::getenv(name.c_str());
    return value ? std::optional<std::string>(value) : std::nullopt;
  };
}

Topology detect_topology(const Environment& environment) {
  Topology known;
  const auto hear = [&known](const std::optional<Topology>& claim) {
    if (!claim) return;
    if (known.source.empty()) {
      known = *claim;
    } else {
      merge(known, *claim);
    }
  };
  hear(read_claim(environment, kExplicit));
  hear(read_claim(environment, kTorchrun));
  const std::optional<Topology> open_mpi = read_claim(environment, kOpenMpi);
  const std::optional<Topology> pmi = read_claim(environment, kPmi);
  hear(open_mpi);
  hear(pmi);
  const std::optional<Topology> slurm = read_slurm(environment);
  const bool carries_daemons = (open_mpi || pmi) && slurm && slurm->world < known.world;
  if (!carries_daemons) hear(slurm);
  check_pmix(environment, known);
  if (known.source.empty()) known.source = "no launcher";
  known.host = host_name(environment);
  if (known.world == 1) {
    known.local_rank = known.node = 0;
    known.local_world = known.num_nodes = 1;
  }
  return known;
}

void place_on_nodes(Topology& topology, Comm& world) {
  std::vector<NodePlace> places;
  for (const std::string& line : gather_texts(world, to_line(topology))) {
    places.push_back(from_line(line));
  }
  std::map<std::string, int> node_numbers;  // of each node, in order of its lowest rank
  std::vector<int> node_of, local_rank_of, ranks_on;
  std::map<std::pair<int, int>, int> taken;
  for (int r = 0; r < world.size(); ++r) {
    const NodePlace& p = places[r];
    const bool silent = p.source == "no launcher";
    GRAFT_CHECK(silent || (p.rank == r && p.world == world.size()), "rank ", r, " of ",
                world.size(), " by MPI is rank ", p.rank, " of ", p.world, " by ", p.source, " on ",
                p.host, ": start all ranks with mpirun, or with srun --mpi=pmix");
    const std::string key =
        silent || p.node == kUnknown ? "host " + p.host : "node " + std::to_string(p.node);
    const int node = node_numbers.try_emplace(key, node_numbers.size()).first->second;
    if (node == static_cast<int>(ranks_on.size())) ranks_on.push_back(0);
    const int local_rank = silent || p.local_rank == kUnknown ? ranks_on[node] : p.local_rank;
    const auto [place, is_free] = taken.try_emplace({node, local_rank}, r);
    GRAFT_CHECK(is_free, "ranks ", place->second, " and ", r, " both claim local rank ", local_rank,
                " on ", p.host, ": two launchers are mixed, or two hosts have one name");
    ++ranks_on[node];
    node_of.push_back(node);
    local_rank_of.push_back(local_rank);
  }
  topology.rank = world.rank();
  topology.world = world.size();
  topology.node = node_of[world.rank()];
  topology.num_nodes = static_cast<int>(node_numbers.size());
  topology.local_rank = local_rank_of[world.rank()];
  topology.local_world = ranks_on[topology.node];
}

}  // namespace graft::dist
