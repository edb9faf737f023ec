#include "launcher/version.h"

#include <unistd.h>

#include <filesystem>

namespace graft::launcher {

std::string version_text() {
#ifdef GRAFT_WITH_CUDA
  const std::string build = "CUDA";
#else
  const std::string build = "CPU";
#endif
  const std::string commit = GRAFT_COMMIT;
  return std::string("graft ")
      .append(GRAFT_VERSION)
      .append(" (")
      .append(commit)
      .append(", ")
      .append(build)
      .append(" build)");
}

std::string source_dir() {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  const fs::path beside =
      program.parent_path().parent_path().parent_path();  // build/<preset>/graft
  return fs::exists(beside / "data" / "prepare") ? beside.string() : std::string(GRAFT_SOURCE_DIR);
}

std::string python() {
  const std::string own = source_dir().append("/.venv/bin/python");
  return access(own.c_str(), X_OK) == 0 ? own : "python3";
}

}  // namespace graft::launcher
