#include "launcher/checkpoint/manifest.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "configs/check.h"
#include "models/io/byte_sink.h"
#include "models/io/json_file.h"

namespace graft::launcher {
namespace {

constexpr int kManifestFormat = 1;

}  // namespace

Digest::Digest() : state_(XXH3_createState(), &XXH3_freeState) { XXH3_128bits_reset(state_.get()); }

std::string Digest::hex() const {
  const XXH128_hash_t h = XXH3_128bits_digest(state_.get());
  std::array<char, 33> text{};
  std::snprintf(text.data(), text.size(), "%016llx%016llx",
                static_cast<unsigned long long>(h.high64),
                static_cast<unsigned long long>(h.low64));
  return text.data();
}

FileFacts facts_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  GRAFT_CHECK(in.good(), ExitCode::kData, path, ": cannot be read: ", std::strerror(errno));
  Digest digest;
  uint64_t bytes = 0;
  std::vector<char> buffer(size_t{1} << 20);
  while (in.read(buffer.data(), static_cast<std::streamsize>(buffer.size())), in.gcount() > 0) {
    digest.update(buffer.data(), static_cast<size_t>(in.gcount()));
    bytes += static_cast<uint64_t>(in.gcount());
  }
  return {bytes, digest.hex()};
}

void write_text(const std::string& path, const std::string& text) {
  models::io::write_file(
      path, [&](const models::io::ByteSink& sink) { sink(std::as_bytes(std::span(text))); });
}

void write_manifest(const std::string& directory, const Manifest& manifest) {
  nlohmann::json files = nlohmann::json::object();
  for (const auto& [name, facts] : manifest)
    files[name] = {{"bytes", facts.bytes}, {"xxh3_128", facts.hash}};
  write_text(directory + "/" + kManifestFile,
             nlohmann::json{{"format", kManifestFormat}, {"files", files}}.dump(2) + "\n");
}

std::string verify(const std::string& directory) {
  namespace fs = std::filesystem;
  const std::string path = directory + "/" + kManifestFile;
  if (!fs::is_directory(directory)) return "there is no such folder";
  if (!fs::exists(path))
    return "it has no " + std::string(kManifestFile) + ": the save was cut off";
  try {
    const nlohmann::json manifest = models::io::read_json_file(path);
    if (manifest.at("format") != kManifestFormat)
      return "format " + manifest.at("format").dump() + " is not known";
    if (manifest.at("files").empty()) return "its manifest lists no file";
    for (const auto& [name, expected] : manifest.at("files").items()) {
      if (fs::path(name).is_absolute() || name.find("..") != std::string::npos)
        return "its manifest names " + name;
      const std::string file = directory + "/" + name;
      if (!fs::is_regular_file(file)) return name + " is missing";
      const FileFacts facts = facts_of(file);
      if (facts.bytes != expected.at("bytes").get<uint64_t>()) {
        return name + " has " + std::to_string(facts.bytes) + " bytes, expected " +
               expected.at("bytes").dump();
      }
      if (facts.hash != expected.at("xxh3_128").get<std::string>())
        return name + " has another hash: its bytes changed";
    }
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

void sync_directory(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY);
  GRAFT_CHECK(fd >= 0, ExitCode::kData, path, ": ", std::strerror(errno));
  const int failed = fsync(fd);
  const int reason = errno;
  close(fd);
  GRAFT_CHECK(failed == 0, ExitCode::kData, path,
              ": cannot be flushed to disk: ", std::strerror(reason));
}

}  // namespace graft::launcher
