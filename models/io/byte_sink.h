// ByteSink: where the writers of this folder put their bytes, so that a checkpoint can hash what it
// writes; and write_file, the sink that is a file.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>

namespace graft::models::io {

using ByteSink = std::function<void(std::span<const std::byte>)>;

/// @throws graft::Error (kData) for a device, pipe or folder: a file would take its place
void check_replaceable(const std::string& path);

/// Writes a file whole or not at all: `fill` writes to a neighbour that was not there before, which
/// is flushed to disk and renamed over `path`.
/// @throws graft::Error (kData) naming the path and the system's reason; what was at `path` is then
/// untouched
void write_file(const std::string& path, const std::function<void(const ByteSink&)>& fill);

}  // namespace graft::models::io
