#include "dist/topology.h"

#include <gtest/gtest.h>

#include <map>
#include <vector>

#include "configs/check.h"
#include "dist/comm_factory.h"

namespace graft::dist {
namespace {

using Variables = std::map<std::string, std::string>;

Topology detect(const Variables& variables) {
  return detect_topology([&](const std::string& name) -> std::optional<std::string> {
    const auto found = variables.find(name);
    return found == variables.end() ? std::nullopt : std::optional(found->second);
  });
}

const Variables kMpirun = {{"OMPI_COMM_WORLD_RANK", "5"},
                           {"OMPI_COMM_WORLD_SIZE", "8"},
                           {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                           {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                           {"PMIX_RANK", "5"},
                           {"PMIX_HOSTNAME", "node7"}};
const Variables kSrun = {{"SLURM_STEP_ID", "0"},        {"SLURM_PROCID", "5"},
                         {"SLURM_STEP_NUM_TASKS", "8"}, {"SLURM_NTASKS", "8"},
                         {"SLURM_LOCALID", "1"},        {"SLURM_NODEID", "1"},
                         {"SLURM_STEP_NUM_NODES", "2"}, {"PMIX_RANK", "5"}};

Variables with(Variables variables, const Variables& more) {
  for (const auto& [name, value] : more) variables[name] = value;
  return variables;
}

TEST(Topology, HearsEveryLauncher) {
  constexpr int kUnknown = Topology::kUnknown;
  struct Case {
    Variables variables;
    std::string source;
    int rank, world, local_rank, local_world, node;
  };
  const std::vector<Case> cases = {
      {{}, "no launcher", 0, 1, 0, 1, 0},
      {{{"GRAFT_RANK", "1"}, {"GRAFT_WORLD_SIZE", "2"}, {"GRAFT_LOCAL_RANK", "0"}},
       "the explicit choice",
       1,
       2,
       0,
       kUnknown,
       kUnknown},
      {{{"RANK", "3"},
        {"WORLD_SIZE", "4"},
        {"LOCAL_RANK", "1"},
        {"LOCAL_WORLD_SIZE", "2"},
        {"GROUP_RANK", "1"}},
       "torchrun",
       3,
       4,
       1,
       2,
       1},
      {kMpirun, "Open MPI", 5, 8, 1, 4, kUnknown},
      {{{"PMI_RANK", "2"}, {"PMI_SIZE", "4"}, {"MPI_LOCALRANKID", "0"}, {"MPI_LOCALNRANKS", "2"}},
       "PMI",
       2,
       4,
       0,
       2,
       kUnknown},
      {kSrun, "Slurm", 5, 8, 1, kUnknown, 1},
      // srun --mpi=pmi2: both speak and agree; the first gives the name, Slurm the node.
      {with(kSrun, {{"PMI_RANK", "5"}, {"PMI_SIZE", "8"}}), "PMI", 5, 8, 1, kUnknown, 1},
      // An salloc shell and a batch script launched nothing.
      {{{"SLURM_NTASKS", "8"}, {"SLURM_JOB_ID", "7"}}, "no launcher", 0, 1, 0, 1, 0},
      {{{"SLURM_NTASKS", "8"}, {"SLURM_PROCID", "0"}, {"SLURM_NODEID", "0"}},
       "no launcher",
       0,
       1,
       0,
       1,
       0},
      // mpirun in a batch script: on other nodes its daemons are a Slurm step of their own.
      {with(kMpirun, {{"SLURM_STEP_ID", "0"}, {"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "1"}}),
       "Open MPI", 5, 8, 1, 4, kUnknown},
      // srun --pty of one task in a larger allocation.
      {{{"SLURM_STEP_ID", "1"},
        {"SLURM_PROCID", "0"},
        {"SLURM_STEP_NUM_TASKS", "1"},
        {"SLURM_NTASKS", "8"}},
       "Slurm",
       0,
       1,
       0,
       1,
       0},
  };
  for (const Case& c : cases) {
    const Topology t = detect(c.variables);
    EXPECT_EQ(t.source, c.source);
    EXPECT_EQ(t.rank, c.rank) << c.source;
    EXPECT_EQ(t.world, c.world) << c.source;
    EXPECT_EQ(t.local_rank, c.local_rank) << c.source;
    EXPECT_EQ(t.local_world, c.local_world) << c.source;
    EXPECT_EQ(t.node, c.node) << c.source;
    EXPECT_FALSE(t.host.empty());
  }
  EXPECT_EQ(detect(kMpirun).host, "node7");
}

TEST(Topology, StopsAndNamesWhatMakesNoSense) {
  struct Case {
    Variables variables;
    std::vector<std::string> named;
  };
  const std::vector<Case> cases = {
      {{{"RANK", "0"}, {"WORLD_SIZE", "two"}}, {"WORLD_SIZE", "two"}},
      {{{"RANK", "-1"}, {"WORLD_SIZE", "2"}}, {"RANK", "-1"}},
      {{{"RANK", "1x"}, {"WORLD_SIZE", "2"}}, {"RANK", "1x"}},
      {{{"RANK", ""}, {"WORLD_SIZE", "2"}}, {"RANK"}},
      {{{"RANK", "99999999999"}, {"WORLD_SIZE", "2"}}, {"RANK", "99999999999"}},
      {{{"RANK", "2"}, {"WORLD_SIZE", "2"}}, {"RANK=2", "WORLD_SIZE=2"}},
      {{{"RANK", "0"}, {"WORLD_SIZE", "0"}}, {"WORLD_SIZE=0"}},
      {{{"RANK", "0"}}, {"RANK", "WORLD_SIZE"}},
      {{{"OMPI_COMM_WORLD_SIZE", "2"}}, {"OMPI_COMM_WORLD_RANK"}},
      {with(kMpirun, {{"OMPI_COMM_WORLD_LOCAL_RANK", "4"}}), {"OMPI_COMM_WORLD_LOCAL_RANK=4"}},
      {with(kMpirun, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "9"}}), {"OMPI_COMM_WORLD_LOCAL_SIZE=9"}},
      {with(kSrun, {{"SLURM_NODEID", "2"}}), {"SLURM_NODEID=2"}},
      // Two launchers that disagree are both printed.
      {with(kMpirun, {{"RANK", "0"}, {"WORLD_SIZE", "2"}}),
       {"torchrun says rank 0 of 2", "Open MPI says rank 5 of 8"}},
      {with(kMpirun, {{"GRAFT_RANK", "4"}, {"GRAFT_WORLD_SIZE", "8"}}),
       {"the explicit choice says rank 4 of 8", "Open MPI says rank 5 of 8"}},
      {with(kSrun, {{"RANK", "0"}, {"WORLD_SIZE", "2"}}),
       {"torchrun says rank 0 of 2", "Slurm says rank 5 of 8"}},
      {with(kMpirun, with(kSrun, {{"SLURM_PROCID", "4"}})), {"Open MPI says", "Slurm says rank 4"}},
      {with(kMpirun, {{"LOCAL_RANK", "2"}, {"RANK", "5"}, {"WORLD_SIZE", "8"}}),
       {"torchrun says", "local rank 2", "local rank 1"}},
      {with(kMpirun, {{"PMIX_RANK", "3"}}), {"Open MPI says rank 5", "PMIx says rank 3"}},
  };
  for (const Case& c : cases) {
    try {
      detect(c.variables);
      ADD_FAILURE() << "accepted; expected a complaint about " << c.named[0];
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      for (const std::string& name : c.named) {
        EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
      }
    }
  }
}

Topology claim(Comm& comm, const std::string& host) {
  Topology t;
  t.rank = comm.rank();
  t.world = comm.size();
  t.source = "test";
  t.host = host;
  return t;
}

TEST(Topology, PlacesRanksOnNodesByHostName) {
  run_virtual_ranks(5, [](Comm& comm) {
    const std::vector<std::string> hosts = {"b", "a 1", "b", "a 1", "b"};
    Topology t = claim(comm, hosts[comm.rank()]);
    place_on_nodes(t, comm);
    EXPECT_EQ(t.node, (std::vector{0, 1, 0, 1, 0})[comm.rank()]);
    EXPECT_EQ(t.local_rank, (std::vector{0, 0, 1, 1, 2})[comm.rank()]);
    EXPECT_EQ(t.local_world, (std::vector{3, 2, 3, 2, 3})[comm.rank()]);
    EXPECT_EQ(t.num_nodes, 2);
  });
}

TEST(Topology, TakesMpiAtItsWordWhereNoLauncherSpeaks) {
  run_virtual_ranks(3, [](Comm& comm) {
    Topology t = detect({});
    place_on_nodes(t, comm);
    EXPECT_EQ(t.rank, comm.rank());
    EXPECT_EQ(t.world, 3);
    EXPECT_EQ(t.local_rank, comm.rank());
  });
}

TEST(Topology, AllRanksStopIfOneDisagreesWithMpi) {
  run_virtual_ranks(3, [](Comm& comm) {
    Topology t = claim(comm, "host");
    if (comm.rank() == 1) t.rank = 2;
    EXPECT_THROW(place_on_nodes(t, comm), Error);
  });
}

TEST(Topology, TwoRanksMayNotClaimOnePlace) {
  run_virtual_ranks(2, [](Comm& comm) {
    Topology t = claim(comm, "host");
    t.local_rank = 0;
    EXPECT_THROW(place_on_nodes(t, comm), Error);
  });
}

}  // namespace
}  // namespace graft::dist
