#include "launcher/checkpoint/folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>

#include "configs/check.h"
#include "configs/log.h"
#include "launcher/checkpoint/manifest.h"
#include "launcher/run.h"

namespace graft::launcher {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kStep = "step-", kPartial = ".tmp-", kOld = ".old-";

fs::path neighbour(fs::path path, std::string_view prefix) {
  if (!path.has_filename()) path = path.parent_path();  // "out/"
  return path.parent_path() / (std::string(prefix) + path.filename().string());
}

/// The step of `step-<digits>`; nothing for any other name: those folders are not ours.
std::optional<int64_t> step_of(std::string_view name) {
  if (!name.starts_with(kStep)) return std::nullopt;
  name.remove_prefix(kStep.size());
  int64_t step = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), step);
  const bool digits = error == std::errc() && end == name.data() + name.size() && name[0] != '-';
  return digits ? std::optional(step) : std::nullopt;
}

struct Candidate {
  int64_t step;
  fs::path path;
};

std::vector<Candidate> newest_first(const std::string& checkpoints) {
  std::vector<Candidate> found;
  for (const auto& entry : fs::directory_iterator(checkpoints)) {
    const auto step = step_of(entry.path().filename().string());
    if (step && entry.is_directory()) found.push_back({*step, entry.path()});
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) {
    return std::pair(a.step, a.path) > std::pair(b.step, b.path);
  });
  return found;
}

/// What jobs that were killed inside a FolderReplacement left in `folder`.
void recover_all(const fs::path& folder) {
  std::set<fs::path> places;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename();
    for (const std::string_view prefix : {kPartial, kOld}) {
      if (name.starts_with(prefix)) places.insert(folder / name.substr(prefix.size()));
    }
  }
  for (const fs::path& place : places) FolderReplacement::recover(place);
}

/// Whether the open file is the one of that name.
bool is_named(int descriptor, const std::string& path) {
  struct stat opened = {};
  struct stat named = {};
  return fstat(descriptor, &opened) == 0 && stat(path.c_str(), &named) == 0 &&
         opened.st_ino == named.st_ino;
}

}  // namespace

std::string checkpoint_path(const std::string& output_dir, int64_t step) {
  char name[32];
  std::snprintf(name, sizeof name, "step-%08lld", static_cast<long long>(step));
  return output_dir + "/checkpoints/" + name;
}

// --- FolderReplacement ---

FolderReplacement::FolderReplacement(std::string path) : path_(std::move(path)) {
  std::error_code error;
  fs::remove_all(partial_path(), error);
  if (!error) fs::create_directories(partial_path(), error);
  GRAFT_CHECK(!error, ExitCode::kData, partial_path(), " cannot be made: ", error.message());
}

FolderReplacement::~FolderReplacement() {
  std::error_code ignored;  // recover() tries again
  fs::remove_all(partial_path(), ignored);
}

std::string FolderReplacement::partial_path(const std::string& path) {
  return neighbour(path, kPartial);
}

void FolderReplacement::commit() {
  const fs::path old = neighbour(path_, kOld);
  sync_directory(partial_path());
  if (fs::exists(path_)) fs::rename(path_, old);
  fs::rename(partial_path(), path_);
  sync_directory(fs::absolute(partial_path()).parent_path());
  fs::remove_all(old);
}

void FolderReplacement::recover(const std::string& path) {
  const fs::path old = neighbour(path, kOld);
  fs::remove_all(partial_path(path));
  if (!fs::exists(old)) return;
  if (fs::exists(path)) {
    fs::remove_all(old);
  } else {
    fs::rename(old, path);
  }
}

// --- NewPaths ---

void NewPaths::make_folder(const fs::path& path, std::error_code& error) {
  std::error_code unknown;  // making it says more
  if (path.empty() || fs::is_directory(path, unknown)) return;
  make_folder(path.parent_path(), error);
  if (!error && fs::create_directory(path, error)) add(path);
}

void NewPaths::undo() {
  std::error_code ignored;
  for (auto path = paths_.rbegin(); path != paths_.rend(); ++path) fs::remove(*path, ignored);
  paths_.clear();
}

// --- OutputDirectory ---

OutputDirectory::OutputDirectory(std::string path, const World& world) : path_(std::move(path)) {
  if (world.rank() != 0) return;
  lock();
  make_folder(path_ + "/checkpoints");
  sync_directory(path_);
  recover_all(path_ + "/checkpoints");
  FolderReplacement::recover(adapter_path());
}

void OutputDirectory::make_folder(const std::string& path) {
  std::error_code error;
  new_.make_folder(path, error);
  GRAFT_CHECK(!error, "checkpoint.output_dir: ", path, " cannot be made: ", error.message());
}

/// A job whose start fails removes the file that it made and locked: a lock counts only while its
/// file has its name.
void OutputDirectory::lock() {
  const std::string file = path_ + "/LOCK";
  bool is_new = false;
  do {
    if (lock_ >= 0) close(lock_);
    make_folder(path_);
    is_new = !fs::exists(file);
    lock_ = open(file.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644);
    GRAFT_CHECK(lock_ >= 0, "checkpoint.output_dir: ", path_,
                " cannot be written: ", std::strerror(errno));
    GRAFT_CHECK(flock(lock_, LOCK_EX | LOCK_NB) == 0, "checkpoint.output_dir: ", path_,
                " is in use by another running job; choose another one");
  } while (!is_named(lock_, file));
  if (is_new) new_.add(file);
}

OutputDirectory::~OutputDirectory() {
  new_.undo();  // before another job may lock the folder
  if (lock_ >= 0) close(lock_);
}

std::optional<std::string> OutputDirectory::newest_checkpoint(World& world) {
  std::string choice, said;
  if (world.rank() == 0) {
    for (const auto& [step, path] : newest_first(path_ + "/checkpoints")) {
      const std::string problem = verify(path);
      if (problem.empty()) {
        choice = path;
        break;
      }
      passed_over_.insert(step);
      said += "\n  " + path.filename().string() + ": " + problem;
    }
  }
  choice = dist::broadcast_text(*world.host, choice, 0);
  said = dist::broadcast_text(*world.host, said, 0);
  GRAFT_CHECK(!choice.empty() || said.empty(), ExitCode::kNoCheckpoint, path_,
              ": no checkpoint can be loaded:", said,
              "\nTo start over, choose another checkpoint.output_dir.");
  if (!said.empty()) log::warn("checkpoints passed over:" + said);
  return choice.empty() ? std::nullopt : std::optional(choice);
}

void OutputDirectory::check_unused(const std::string& config) const {
  const std::string saved = path_ + "/config.yaml", measured = path_ + "/metrics.jsonl";
  std::string found;
  if (fs::exists(adapter_path())) {
    found = "adapter/";
  } else if (fs::exists(saved)) {
    const auto conflicts = resume_conflicts(configs::read_file(saved), config);
    if (!conflicts.empty()) found = "config.yaml, with\n  " + configs::join(conflicts, "\n  ");
  } else if (fs::exists(measured) && fs::file_size(measured) > 0) {
    found = "metrics.jsonl";
  }
  GRAFT_CHECK(found.empty(), "checkpoint.output_dir: ", path_,
              " holds what another run left, and no checkpoint to go on from: ", found,
              "\nChoose another checkpoint.output_dir, or remove that run.");
}

void OutputDirectory::prune(int64_t saved_step, int limit, int64_t best_step) {
  passed_over_.erase(saved_step);
  int kept = 0;
  for (const auto& [step, path] : newest_first(path_ + "/checkpoints")) {
    const bool good = !passed_over_.contains(step) && fs::exists(path / kManifestFile);
    if (good && (kept++ < limit || step == best_step)) continue;
    // Without its manifest it is no checkpoint any more, however far the removal gets.
    fs::remove(path / kManifestFile);
    fs::remove_all(path);
  }
}

}  // namespace graft::launcher
