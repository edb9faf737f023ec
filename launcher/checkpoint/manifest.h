// Manifest: the list of a checkpoint's files with their sizes and hashes. It is written last, so a
// folder without one is not a checkpoint; verifying it finds every flipped, cut or missing byte.
#pragma once

#include <xxhash.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace graft::launcher {

/// XXH3-128 of bytes that come in pieces.
class Digest {
 public:
  Digest();
  void update(const void* bytes, size_t size) { XXH3_128bits_update(state_.get(), bytes, size); }
  std::string hex() const;

 private:
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state_;
};

struct FileFacts {
  uint64_t bytes = 0;
  std::string hash;  ///< XXH3-128, hex
};

using Manifest = std::map<std::string, FileFacts>;  ///< by file name inside the folder

constexpr const char* kManifestFile = "MANIFEST.json";

/// Size and hash of a file. @throws graft::Error (kData)
FileFacts facts_of(const std::string& path);

/// Writes a text file whole or not at all, flushed to disk.
void write_text(const std::string& path, const std::string& text);
void write_manifest(const std::string& directory, const Manifest& manifest);
/// @return why the folder is not a good checkpoint; empty: every file is there and has its hash
std::string verify(const std::string& directory);
/// Flushes a folder's entries to disk.
void sync_directory(const std::string& path);

}  // namespace graft::launcher
