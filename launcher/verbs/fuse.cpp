// graft fuse: several adapters into one LoRA, so that each keeps its effect on its own data.
#include "launcher/fuse.h"

#include <cstdio>

#include "launcher/verbs/verbs.h"

namespace graft::launcher {
namespace {

struct FuseArguments {
  RunArguments run;
  FuseOptions options;
};

int run_fuse(const FuseArguments& arguments, const dist::Topology& topology,
             dist::MpiSession* session) {
  const auto run = configs::load_config<Run>(arguments.run.config, arguments.run.overrides);
  World world = join_world(topology, session, run.parallel);
  const FuseReport report = fuse_adapters(world, run, arguments.options);
  if (world.rank() != 0) return 0;
  std::printf("%s: rank %d on %zu matrices\n", arguments.options.output.c_str(),
              arguments.options.rank, report.num_matrices);
  std::printf("of what each adapter does on its data %.4f %% is lost (a plain mean: %.4f %%)\n",
              100 * report.lost, 100 * report.averaged);
  return 0;
}

}  // namespace

void add_fuse(CLI::App& app, Command& command) {
  auto* verb =
      app.add_subcommand("fuse", "Several adapters as one LoRA, each kept on its own data");
  auto arguments = std::make_shared<FuseArguments>();
  FuseOptions& options = arguments->options;
  add_run_arguments(*verb, arguments->run);
  verb->add_option("--adapter", options.adapters, "adapter folder; several")->required();
  verb->add_option("--data", options.data,
                   "shards that stand for each adapter's task, in their order")
      ->required();
  verb->add_option("--rank", options.rank, "of the LoRA; their sum of ranks loses nothing")
      ->required()
      ->check(CLI::Range(1, 65536));
  verb->add_option("--epsilon", options.epsilon,
                   "how much the untouched matrix counts, as a share of the inputs' mean square")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  verb->add_option("--output", options.output, "folder to make; must not exist")->required();
  verb->footer(
      "Examples:\n  graft fuse run.yaml --adapter a b --data a.h5 b.h5 --rank 16 --output fused\n"
      "  cluster/mpirun.sh -np 2 graft fuse run.yaml --adapter a b --data a.h5 b.h5 --rank 8 "
      "--output fused");
  verb->callback([arguments, &command] {
    command.run_on_ranks = [arguments](const dist::Topology& topology, dist::MpiSession* session) {
      return run_fuse(*arguments, topology, session);
    };
  });
}

}  // namespace graft::launcher
