#include "models/io/open_source.h"

#include <filesystem>

#include "configs/check.h"
#include "models/io/gguf_source.h"
#include "models/io/safetensors_source.h"

namespace graft::models::io {
namespace {

namespace fs = std::filesystem;

/// A folder without safetensors: is there something in it that the user meant?
std::string hint(const fs::path& folder) {
  std::error_code unreadable;
  for (const auto& entry : fs::directory_iterator(folder, unreadable)) {
    const fs::path extension = entry.path().extension();
    if (extension == ".gguf")
      return "; it holds a GGUF file: give its path, " + entry.path().string();
    if (extension == ".bin" || extension == ".pt" || extension == ".pth") {
      return "; it holds pickle weights (" + entry.path().filename().string() +
             "), which can run code and are never read: convert them to safetensors";
    }
  }
  return unreadable ? "; " + unreadable.message() : "";
}

}  // namespace

bool has_safetensors(const std::string& folder) {
  std::error_code unreadable;
  for (const auto& entry : fs::directory_iterator(folder, unreadable)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")) return true;
  }
  return false;
}

std::unique_ptr<TensorSource> open_source(const std::string& path) {
  std::error_code unreadable;
  GRAFT_CHECK(fs::exists(path, unreadable), ExitCode::kData, path, ": ",
              unreadable ? unreadable.message() : "no such file or folder");
  if (fs::is_directory(path, unreadable)) {
    GRAFT_CHECK(has_safetensors(path), ExitCode::kData, path,
                ": no .safetensors files in this folder", hint(path));
    return std::make_unique<SafetensorsSource>(path);
  }
  const fs::path extension = fs::path(path).extension();
  if (extension == ".safetensors") return std::make_unique<SafetensorsSource>(path);
  GRAFT_CHECK(extension == ".gguf", ExitCode::kData, path,
              ": expected a Hugging Face folder, a .safetensors or a .gguf file");
  return std::make_unique<GgufSource>(path);
}

}  // namespace graft::models::io
