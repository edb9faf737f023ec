// What the tests of models/io share: files made of bytes, folders that vanish, and what a refusal
// looks like.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

#include "configs/check.h"

namespace graft::models::io {

/// A folder of the test's own, removed with it.
class TestFolder {
 public:
  TestFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "graft_io_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TestFolder() { std::filesystem::remove_all(path_); }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;

  std::string path() const { return path_.string(); }
  /// Writes a file and returns its path.
  std::string write(const std::string& name, std::string_view bytes) const {
    std::string path = (path_ / name).string();
    std::ofstream(path, std::ios::binary) << bytes;
    return path;
  }

 private:
  std::filesystem::path path_;
};

inline std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline nlohmann::json golden(const std::string& name) {
  return nlohmann::json::parse(std::ifstream(GRAFT_SOURCE_DIR "/tests/golden/" + name));
}

inline std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

inline std::span<const std::byte> as_span(std::string_view text) {
  return std::as_bytes(std::span(text));
}

inline std::string_view bytes_of(const at::Tensor& tensor) {
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()};
}

/// CRC-32 of zlib.
inline uint32_t crc32(std::string_view bytes) {
  uint32_t crc = 0xffffffffu;
  for (const char c : bytes) {
    crc ^= static_cast<uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xedb88320u : 0u);
  }
  return ~crc;
}

/// The value's bytes as they lie in a file.
template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

/// Expects an Error of `code` whose message holds `words`.
template <class Action>
void expect_refused(Action action, const std::string& words, ExitCode code = ExitCode::kData) {
  try {
    action();
    ADD_FAILURE() << "accepted; expected a refusal with '" << words << "'";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

/// Runs `read` on damaged copies of a file: cut after every 97th byte, and with one byte at a time
/// changed. Each must be read or refused with kData. @return how many were refused
template <class Read>
int count_refusals(const std::string& file, Read read) {
  int refused = 0;
  const auto attempt = [&](const std::string& bytes) {
    try {
      read(bytes);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kData) << error.what();
      ++refused;
    }
  };
  for (size_t size = 0; size < file.size(); size += 97) attempt(file.substr(0, size));
  for (size_t at = 0; at < file.size(); ++at) {
    for (const int change : {0x01, 0x80}) {
      std::string bytes = file;
      bytes[at] = static_cast<char>(bytes[at] ^ change);
      attempt(bytes);
    }
  }
  return refused;
}

}  // namespace graft::models::io
