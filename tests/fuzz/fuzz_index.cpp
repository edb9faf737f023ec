// Any bytes as the index of a sharded checkpoint: refused, or file names that stay in its folder.
#include <cstdlib>
#include <filesystem>
#include <string>

#include "configs/check.h"
#include "models/io/safetensors_header.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::filesystem::path folder = "/models/base";
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    for (const auto& [tensor, file] : graft::models::io::parse_safetensors_index(text, "input")) {
      const auto path = (folder / file).lexically_normal();
      if (path.parent_path() != folder || path.filename() != file) std::abort();
      if (file.find('\0') != std::string::npos) std::abort();
    }
  } catch (const graft::Error& error) {
    if (error.code() != graft::ExitCode::kData) std::abort();
  }
  return 0;
}
