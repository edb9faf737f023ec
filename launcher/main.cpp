// The graft program: parse, find the ranks, run the verb. Every error ends here, so that no rank
// waits forever.
#include <c10/util/Exception.h>

#include <malloc.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>

#include "configs/check.h"
#include "configs/log.h"
#include "configs/names.h"
#include "launcher/progress.h"
#include "launcher/verbs/verbs.h"
#include "launcher/version.h"

namespace graft::launcher {
namespace {

/// @throws graft::Error (kData) if what the verb printed did not arrive
int run_verb(const Command& command, const dist::Topology& topology, dist::MpiSession* session) {
  const int code = command.run ? command.run() : command.run_on_ranks(topology, session);
  GRAFT_CHECK(std::fflush(stdout) == 0 && std::ferror(stdout) == 0, ExitCode::kData,
              "standard output cannot be written: is the disk full?");
  return code;
}

/// Ranks other than 0 wait before they report an error: where rank 0 met the same one it has said
/// so and ends them with SIGTERM, which a verb may have been watching.
void let_rank_zero_speak(int rank) {
  if (rank == 0) return;
  std::signal(SIGTERM, SIG_DFL);
  std::this_thread::sleep_for(std::chrono::seconds(2));
}

/// Says what went wrong, once for the job, and ends all ranks.
int fail(const std::string& message, ExitCode code, int rank, dist::MpiSession* session) {
  let_rank_zero_speak(rank);
  log::error(message);
  if (session != nullptr) session->abort(code);
  return static_cast<int>(code);
}

std::string out_of_memory(int rank, const std::string& details) {
  return "out of memory on rank " + std::to_string(rank) + (details.empty() ? "" : ": ") + details +
         "\nSmaller: data.max_length, train.per_device_train_batch_size, "
         "parallel.lanes_per_gather; "
         "or train.gradient_checkpointing: true.";
}

template <class F>
int guarded(int rank, dist::MpiSession* session, F action) {
  try {
    return action();
  } catch (const Error& error) {
    return fail(error.what(), error.code(), rank, session);
  } catch (const std::filesystem::filesystem_error& error) {
    return fail(error.path1().string() + ": " + error.code().message(), ExitCode::kData, rank,
                session);
  } catch (const std::bad_alloc&) {
    return fail(out_of_memory(rank, ""), ExitCode::kMemory, rank, session);
  } catch (const c10::OutOfMemoryError& error) {
    return fail(out_of_memory(rank, error.what_without_backtrace()), ExitCode::kMemory, rank,
                session);
  } catch (const c10::Error& error) {  // its what() holds a stack trace
    if (std::string_view(error.what()).find("DefaultCPUAllocator") != std::string_view::npos)
      return fail(out_of_memory(rank, error.what_without_backtrace()), ExitCode::kMemory, rank,
                  session);
    log::debug(error.what());
    return fail(std::string("a bug in Graft, please report it: ") + error.what_without_backtrace(),
                ExitCode::kBug, rank, session);
  } catch (const std::exception& error) {
    return fail(std::string("a bug in Graft, please report it: ") + error.what(), ExitCode::kBug,
                rank, session);
  }
}

/// CLI11 says of a misspelt verb only that one is missing, and knows no nearest name.
std::string usage_message(const CLI::App& app, const CLI::ParseError& error) {
  const std::vector<CLI::App*> verbs = app.get_subcommands();  // that were recognised
  const std::vector<std::string> unknown = app.remaining(true);
  std::vector<std::string> known;
  if (verbs.empty()) {
    for (const CLI::App* verb : app.get_subcommands([](const CLI::App*) { return true; }))
      known.push_back(verb->get_name());
    return (unknown.empty() ? "a verb is missing" : "unknown verb '" + unknown.front() + "'") +
           configs::suggest(unknown.empty() ? "" : unknown.front(), known);
  }
  const CLI::App& verb = *verbs.front();
  if (unknown.empty() || !unknown.front().starts_with("--"))
    return verb.get_name() + ": " + error.what();
  for (const CLI::Option* option : verb.get_options()) {
    for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  }
  return verb.get_name() + ": unknown option '" + unknown.front() + "'" +
         configs::suggest(unknown.front(), known);
}

/// The rank by the launcher's variables; 0 where they make no sense, so that somebody speaks.
int launched_rank() {
  try {
    return dist::detect_topology(dist::process_environment()).rank;
  } catch (const Error&) {
    return 0;
  }
}

/// --help and --version, or a command line that is wrong: once per job.
int end_of_parsing(const CLI::App& app, const CLI::ParseError& error) {
  const int rank = launched_rank();
  if (error.get_exit_code() == 0) return rank == 0 ? app.exit(error) : 0;
  let_rank_zero_speak(rank);
  if (rank == 0) log::error(usage_message(app, error) + "\nRun with --help for more information.");
  return static_cast<int>(ExitCode::kUsage);
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
  std::signal(SIGXFSZ, SIG_IGN);  // a write past the limit then fails as any other, and is told
  // Tensors of a step come and go; giving their pages back to the system each time costs more than
  // the arithmetic.
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  CLI::App app(
      "Graft: fine-tunes large frozen models with small trainable parts, on one GPU or many.",
      "graft");
  app.set_version_flag("--version", version_text());
  app.require_subcommand(1);
  app.fallthrough();  // --debug may stand after the verb
  bool debug = false;
  app.add_flag("--debug", debug, "also log debug messages");
  Command command;
  for (const auto add :
       {add_train, add_eval, add_generate, add_prepare, add_validate, add_methods, add_models,
        add_inspect, add_merge, add_export, add_fuse, add_completion, add_env}) {
    add(app, command);
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return end_of_parsing(app, error);
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
