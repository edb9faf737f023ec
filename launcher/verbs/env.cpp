// graft env: versions, machine and variables as `key: value` lines, for a bug report.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <hdf5.h>
#include <mpi.h>
#include <sys/utsname.h>
#include <torch/version.h>
#include <unistd.h>
#include <xxhash.h>

#include <cstdio>
#include <fstream>
#include <thread>

#include "launcher/facts.h"
#include "launcher/progress.h"
#include "launcher/verbs/verbs.h"
#include "launcher/version.h"

#ifdef GRAFT_WITH_CUDA
#include <nccl.h>

#include "kernels/device.h"
#endif

namespace graft::launcher {
namespace {

std::string dotted(int a, int b, int c) {
  return std::to_string(a) + "." + std::to_string(b) + "." + std::to_string(c);
}

/// What follows the separator in the first line of a file that begins with `key`.
std::string line_value(const char* path, const std::string& key, char separator) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    const size_t at = line.find(separator);
    if (!line.starts_with(key) || at == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t\"", at + 1),
                 end = line.find_last_not_of(" \t\"");
    return begin == std::string::npos ? "" : line.substr(begin, end - begin + 1);
  }
  return "unknown";
}

void add_versions(Facts& facts) {
  char mpi[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(mpi, &length);  // may be asked before MPI is started
  const std::string mpi_text(mpi, static_cast<size_t>(length));
  unsigned major = 0, minor = 0, release = 0;
  H5get_libversion(&major, &minor, &release);
  facts["graft"] = version_text();
  facts["source"] = source_dir();
  facts["python"] = python();
  facts["compiler"] = __VERSION__;
  facts["LibTorch"] = TORCH_VERSION;
  facts["MPI"] = mpi_text.substr(0, mpi_text.find_first_of(",\n"));
  facts["HDF5"] =
      dotted(static_cast<int>(major), static_cast<int>(minor), static_cast<int>(release));
  facts["yaml-cpp"] = GRAFT_YAML_CPP_VERSION;
  facts["spdlog"] = GRAFT_SPDLOG_VERSION;
  facts["CLI11"] = CLI11_VERSION;
  facts["nlohmann-json"] =
      dotted(NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR, NLOHMANN_JSON_VERSION_PATCH);
  const auto xxhash = static_cast<int>(XXH_versionNumber());
  facts["xxHash"] = dotted(xxhash / 10000, xxhash / 100 % 100, xxhash % 100);
}

#ifdef GRAFT_WITH_CUDA
void add_gpus(Facts& facts) {
  int nccl = 0, driver = 0, count = 0;
  NCCL_CHECK(ncclGetVersion(&nccl));
  facts["CUDA"] = dotted(CUDART_VERSION / 1000, CUDART_VERSION / 10 % 100, CUDART_VERSION % 10);
  facts["NCCL"] = dotted(nccl / 10000, nccl / 100 % 100, nccl % 100);
  // A machine without a driver or a GPU is worth reporting, not an error.
  if (cudaDriverGetVersion(&driver) == cudaSuccess)
    facts["CUDA driver"] = dotted(driver / 1000, driver / 10 % 100, driver % 10);
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  facts["GPUs"] = count;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp gpu{};
    CUDA_CHECK(cudaGetDeviceProperties(&gpu, i));
    facts["GPU " + std::to_string(i)] =
        std::string(gpu.name) + ", " + bytes_text(static_cast<int64_t>(gpu.totalGlobalMem)) +
        ", sm_" + std::to_string(gpu.major) + std::to_string(gpu.minor);
  }
}
#else
void add_gpus(Facts& facts) { facts["CUDA"] = "CPU build"; }
#endif

void add_machine(Facts& facts) {
  utsname system{};
  uname(&system);
  facts["host"] = system.nodename;
  facts["system"] = line_value("/etc/os-release", "PRETTY_NAME", '=') + ", " + system.sysname +
                    " " + system.release;
  facts["CPU"] = line_value("/proc/cpuinfo", "model name", ':');
  facts["cores"] = std::thread::hardware_concurrency();
  facts["threads"] = at::get_num_threads();
  facts["memory"] =
      bytes_text(static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE));
}

/// The variables that Graft reads itself, and those that change how its libraries run.
void add_variables(Facts& facts) {
  const dist::Environment environment = dist::process_environment();
  for (const char* name :
       {"GRAFT_RANK", "GRAFT_WORLD_SIZE", "GRAFT_LOCAL_RANK", "GRAFT_LOCAL_WORLD_SIZE",
        "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME"}) {
    facts[name] = environment(name).value_or("not set");
  }
}

int print_environment() {
  Facts facts;
  add_versions(facts);
  add_gpus(facts);
  add_machine(facts);
  add_variables(facts);
  std::fputs(facts_text(facts).c_str(), stdout);
  return 0;
}

}  // namespace

void add_env(CLI::App& app, Command& command) {
  auto* verb = app.add_subcommand("env", "Versions, machine and variables, for a bug report");
  verb->footer(
      "Examples:\n  graft env\n"
      "  cluster/mpirun.sh -np 1 --host node7 graft env");
  verb->callback([&command] { command.run = print_environment; });
}

}  // namespace graft::launcher
