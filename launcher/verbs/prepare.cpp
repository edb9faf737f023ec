// graft prepare: hands over to data/prepare/prepare.py, the Python edge, with the same arguments
// and exit code.
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "configs/check.h"
#include "launcher/verbs/verbs.h"
#include "launcher/version.h"

namespace graft::launcher {
namespace {

int prepare(std::vector<std::string> arguments) {
  const std::string interpreter = python();
  arguments.insert(arguments.begin(), {interpreter, source_dir() + "/data/prepare/prepare.py"});
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  execvp(interpreter.c_str(), argv.data());
  throw Error(ExitCode::kUsage,
              interpreter + ": " + std::strerror(errno) + "; run cluster/install.sh");
}

}  // namespace

void add_prepare(CLI::App& app, Command& command) {
  auto* verb =
      app.add_subcommand("prepare", "Raw text, chat or classification data to HDF5 shards");
  verb->prefix_command();  // everything after the verb is prepare.py's, --help too
  verb->fallthrough(false);
  verb->set_help_flag();
  verb->callback([verb, &command] { command.run = [verb] { return prepare(verb->remaining()); }; });
}

}  // namespace graft::launcher
