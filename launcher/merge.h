// Merging: adapters into the matrices of a base, one tensor at a time, written as a Hugging Face
// folder, unquantised or in bitsandbytes' four bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace graft::launcher {

struct MergeOptions {
  std::string model;                  ///< Hugging Face folder or GGUF file
  std::vector<std::string> adapters;  ///< innermost first
  std::string output;                 ///< a folder that does not exist or is empty
  std::string dtype =
      "auto";  ///< auto: each tensor's own, float32 for one that the file holds quantised
  std::string quantization = "none";  ///< of the blocks' matrices in the output: none | nf4 | fp4
  bool double_quantization = true;    ///< of its scales
  bool any_base = false;  ///< adapters may have been trained on a base with another fingerprint
  int64_t max_file_bytes = 5'000'000'000;  ///< with 4-bit matrices as much is held in memory
};

/// What rounding to the output dtype, and to four bits, leaves of one tensor's change. With W the
/// base, D the change, r() the rounding and K = r(W + D) - r(W): change = |D|^2, kept = <K, D>,
/// noise = |K - D|^2.
struct Survival {
  std::string name;
  double change = 0, kept = 0, noise = 0;

  /// How much of the change is there, along its own direction: 1 all of it, and where nothing
  /// changes; 0 nothing. Rounding errors, which point anywhere, do not count: see noise_ratio().
  double share() const { return change == 0 ? 1 : kept / change; }
  /// The size of what rounding adds, in sizes of the change.
  double noise_ratio() const { return change == 0 ? 0 : std::sqrt(noise / change); }
};

struct MergeReport {
  std::vector<Survival> tensors;  ///< those that adapters change
  Survival total;
  int64_t num_files = 0, bytes = 0;
  std::string without_tokenizer;  ///< why the folder has no tokenizer; empty: it has one
};

/// The folder appears under its name only when it is whole. It does exactly what base and adapters
/// do together; where a tied embedding or head is adapted, the two are untied.
/// @throws graft::Error: kUsage for an adapter that is not a change of matrices, or an output that
/// is not empty; kData for files that do not fit; kNumerics for numbers that the output dtype
/// cannot hold
MergeReport merge(const MergeOptions& options);

}  // namespace graft::launcher
