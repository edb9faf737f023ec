// The folder of a run and what it may hold: one job at a time, checkpoints under the number of
// their step, and folders that change as a whole. Rank 0 alone lists and changes it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include "launcher/world.h"

namespace graft::launcher {

/// `output_dir`/checkpoints/step-NNNNNNNN
std::string checkpoint_path(const std::string& output_dir, int64_t step);

/// A new folder, written beside its place; commit() puts it there in one piece. Whatever a kill
/// leaves, recover() makes the old folder or the new one of it.
class FolderReplacement {
 public:
  /// Makes the empty neighbour. @throws graft::Error (kData)
  explicit FolderReplacement(std::string path);
  /// Removes what was not committed.
  ~FolderReplacement();
  FolderReplacement(const FolderReplacement&) = delete;
  FolderReplacement& operator=(const FolderReplacement&) = delete;

  /// Where the new files go until commit(), for ranks that do not hold the object too.
  static std::string partial_path(const std::string& path);
  std::string partial_path() const { return partial_path(path_); }
  /// Flushes the neighbour to disk and lets it take the place of what was there.
  void commit();
  static void recover(const std::string& path);

 private:
  std::string path_;
};

/// Folders and files that were not there before: they go again, unless they are kept.
class NewPaths {
 public:
  NewPaths() = default;
  ~NewPaths() { undo(); }
  NewPaths(const NewPaths&) = delete;
  NewPaths& operator=(const NewPaths&) = delete;

  /// Makes what is not there yet of a folder and those around it.
  void make_folder(const std::filesystem::path& path, std::error_code& error);
  void add(const std::filesystem::path& path) { paths_.push_back(path); }
  void keep() { paths_.clear(); }
  /// Newest first; a folder that holds something stays.
  void undo();

 private:
  std::vector<std::filesystem::path> paths_;
};

class OutputDirectory {
 public:
  /// Makes the folder, locks it and clears what a killed job left half done. Rank 0; others wait
  /// for the next collective.
  /// @throws graft::Error (kUsage) if it cannot be written or another job holds it
  OutputDirectory(std::string path, const World& world);
  /// Leaves what was there before, and what was made only after keep().
  ~OutputDirectory();
  OutputDirectory(const OutputDirectory&) = delete;
  OutputDirectory& operator=(const OutputDirectory&) = delete;

  /// The run begins: from now on the folder is its own.
  void keep() { new_.keep(); }
  const std::string& path() const { return path_; }
  std::string adapter_path() const { return path_ + "/adapter"; }

  /// The newest checkpoint that verifies, or nothing if there is none at all; says which were
  /// passed over. Collective: all ranks get rank 0's choice.
  /// @throws graft::Error (kNoCheckpoint) if there are checkpoints and none is good
  std::optional<std::string> newest_checkpoint(World& world);

  /// For a folder without checkpoints. What is left of this very run, killed before its first
  /// checkpoint, may be overwritten; nothing else. Rank 0.
  /// @param config  of the run that wants the folder, as configs::dump writes it
  /// @throws graft::Error (kUsage) naming what another run left
  void check_unused(const std::string& config) const;

  /// Keeps the newest `limit` checkpoints and that of `best_step`; those that were passed over go,
  /// now that `saved_step` stands. Rank 0.
  void prune(int64_t saved_step, int limit, int64_t best_step);

 private:
  void make_folder(const std::string& path);
  void lock();

  std::string path_;
  int lock_ = -1;
  NewPaths new_;
  std::set<int64_t> passed_over_;  ///< steps whose folders hold no good checkpoint
};

}  // namespace graft::launcher
