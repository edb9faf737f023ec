#include "launcher/checkpoint/manifest.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <sstream>
#include <vector>

#include "configs/check.h"
#include "models/io/byte_sink.h"
#include "models/io/json_file.h"

namespace graft::launcher {
namespace {

constexpr int kFormat = 1;

}  // namespace

FileFacts facts_of(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  GRAFT_CHECK(in.good(), ExitCode::kData, path, ": cannot be read: ", std::strerror(errno));
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       &XXH3_freeState);
  XXH3_128bits_reset(state.get());
  FileFacts facts;
  std::vector<char> buffer(size_t{1} << 20);
  while (in.read(buffer.data(), static_cast<std::streamsize>(buffer.size())), in.gcount() > 0) {
    XXH3_128bits_update(state.get(), buffer.data(), static_cast<size_t>(in.gcount()));
    facts.bytes += static_cast<uint64_t>(in.gcount());
  }
  const XXH128_hash_t h = XXH3_128bits_digest(state.get());
  std::array<char, 33> hex{};
  std::snprintf(hex.data(), hex.size(), "%016llx%016llx", static_cast<unsigned long long>(h.high64),
                static_cast<unsigned long long>(h.low64));
  facts.hash = hex.data();
  return facts;
}

std::string to_text(const FileFacts& facts) {
  return std::to_string(facts.bytes) + " " + facts.hash;
}

FileFacts from_text(const std::string& text) {
  FileFacts facts;
  std::istringstream(text) >> facts.bytes >> facts.hash;
  return facts;
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
             nlohmann::json{{"format", kFormat}, {"files", files}}.dump(2) + "\n");
}

std::string verify(const std::string& directory) {
  namespace fs = std::filesystem;
  const std::string path = directory + "/" + kManifestFile;
  if (!fs::exists(path))
    return "it has no " + std::string(kManifestFile) + ": the save was cut off";
  try {
    const nlohmann::json manifest = models::io::read_json_file(path);
    if (manifest.at("format") != kFormat)
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
