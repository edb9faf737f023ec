// The graft program: parse, find the ranks, run the verb. The only place that catches, so that no
// rank waits forever.
#include <c10/util/Exception.h>

#include <malloc.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <thread>

#include "configs/check.h"
#include "configs/log.h"
#include "launcher/progress.h"
#include "launcher/verbs/verbs.h"
#include "launcher/version.h"

namespace graft::launcher {
namespace {

int run_verb(const Command& command, const dist::Topology& topology, dist::MpiSession* session) {
  return command.run ? command.run() : command.run_on_ranks(topology, session);
}

/// Says what went wrong, once for the job, and ends all ranks. Ranks other than 0 wait a moment:
/// where rank 0 met the same error it has said so and ends them with SIGTERM, which a verb may have
/// been watching.
int fail(const std::string& message, ExitCode code, int rank, dist::MpiSession* session) {
  if (rank != 0) {
    std::signal(SIGTERM, SIG_DFL);
    std::this_thread::sleep_for(std::chrono::seconds(2));
  }
  log::error(message);
  if (session != nullptr) session->abort(code);
  return static_cast<int>(code);
}

template <class F>
int guarded(int rank, dist::MpiSession* session, F action) {
  try {
    return action();
  } catch (const Error& error) {
    return fail(error.what(), error.code(), rank, session);
  } catch (const std::bad_alloc&) {
    return fail("out of memory on rank " + std::to_string(rank), ExitCode::kMemory, rank, session);
  } catch (const c10::Error& error) {  // its what() holds a stack trace
    log::debug(error.what());
    return fail(std::string("a bug in Graft, please report it: ") + error.what_without_backtrace(),
                ExitCode::kBug, rank, session);
  } catch (const std::exception& error) {
    return fail(std::string("a bug in Graft, please report it: ") + error.what(), ExitCode::kBug,
                rank, session);
  }
}

/// OpenMP threads that wait spin, and on a shared or oversubscribed machine take the cores from
/// those that work (seen: 72 % of a step). The library reads the limit when it is loaded, so the
/// program starts itself once more with it set.
void limit_spinning(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") != nullptr || std::getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("GOMP_SPINCOUNT", "10000", 1);
  std::error_code error;
  const std::string program = std::filesystem::read_symlink("/proc/self/exe", error);
  execv(program.c_str(), argv);  // comes back only if it fails; then the run is slower, not wrong
}

}  // namespace
}  // namespace graft::launcher

int main(int argc, char** argv) {
  using namespace graft;            // NOLINT
  using namespace graft::launcher;  // NOLINT
  limit_spinning(argv);
  // Tensors of a step come and go; giving their pages back to the system each time costs more than
  // the arithmetic.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  CLI::App app(
      "Graft: fine-tunes large frozen models with small trainable parts, on one GPU or many.",
      "graft");
  app.set_version_flag("--version", version_text());
  app.require_subcommand(1);
  app.fallthrough(false);
  bool debug = false;
  app.add_flag("--debug", debug, "also log debug messages");
  Command command;
  for (const auto add : {add_train, add_eval, add_generate, add_prepare, add_validate, add_methods,
                         add_models, add_inspect, add_merge, add_export, add_completion, add_env}) {
    add(app, command);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : static_cast<int>(ExitCode::kUsage);
  }
  return guarded(0, nullptr, [&] {
    dist::Topology topology;
    if (command.run_on_ranks) topology = dist::detect_topology(dist::process_environment());
    std::optional<dist::MpiSession> session;
    if (topology.world > 1) session.emplace(&argc, &argv);
    dist::MpiSession* mpi = session ? &*session : nullptr;
    log::init({topology.rank, topology.world, "", debug});
    Progress::set_enabled(topology.rank == 0);
    return guarded(topology.rank, mpi, [&] { return run_verb(command, topology, mpi); });
  });
}
