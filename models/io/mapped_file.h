// MappedFile: a foreign file, its head mapped for parsing, its tensors read by request. The formats
// parse the mapping in place, so nothing is allocated from a number in a file before that number
// was held against the file's size. What is read long after opening goes through read(): touching
// the mapping of a file that someone cut short meanwhile would end the process by SIGBUS.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace graft::models::io {

class MappedFile {
 public:
  /// @throws graft::Error (kData) if the path is not a readable regular file (a device or a pipe is
  /// refused unread)
  explicit MappedFile(std::string path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }
  /// Fills `out` with the file's bytes from `offset` on.
  /// @throws graft::Error (kData) unless all of them are inside the file, as it was when opened and
  /// as it is now
  void read(uint64_t offset, std::span<std::byte> out) const;

 private:
  void map();

  std::string path_;
  int file_ = -1;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

/// Whether a name read from a file may be opened in that file's folder: one path component, so no
/// '/', '\\', NUL, "." or "..". A symbolic link of such a name is followed, for the Hugging Face
/// cache is made of links to ../../blobs: who can write a link there can write the weights too,
/// while the names come from whoever published the model.
bool is_plain_file_name(std::string_view name);

}  // namespace graft::models::io
