#include "models/io/byte_sink.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "configs/check.h"

namespace graft::models::io {
namespace {

/// Opens `path`.N.partial, of the first free N from the process's number on; follows no link.
int open_new(const std::string& path, std::string& name) {
  constexpr int kMostTries = 1000;
  int descriptor = -1;
  for (int i = 0; i < kMostTries && descriptor < 0 && (i == 0 || errno == EEXIST); ++i) {
    name = path + "." + std::to_string(::getpid() + i) + ".partial";
    descriptor = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
  }
  return descriptor;
}

/// A file under construction; gone again unless committed.
class PartialFile {
 public:
  explicit PartialFile(const std::string& path) : path_(path) {
    check_replaceable(path);
    fd_ = open_new(path, partial_);
    check(fd_ >= 0);
  }
  ~PartialFile() {
    if (fd_ >= 0) ::close(fd_);
    if (!committed_) ::unlink(partial_.c_str());
  }
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;

  void append(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      check(written >= 0);
      bytes = bytes.subspan(static_cast<size_t>(written));
    }
  }

  void commit() {
    check(::fsync(fd_) == 0);
    check(std::rename(partial_.c_str(), path_.c_str()) == 0);
    committed_ = true;
    sync_folder();
  }

 private:
  void check(bool good) const {
    GRAFT_CHECK(good, ExitCode::kData, path_, ": cannot write: ", std::strerror(errno));
  }

  /// The rename itself is on disk only when the folder is.
  void sync_folder() const {
    const std::string parent = std::filesystem::path(path_).parent_path().string();
    const int folder =
        ::open(parent.empty() ? "." : parent.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    check(folder >= 0);
    const bool synced = ::fsync(folder) == 0;
    ::close(folder);
    check(synced);
  }

  std::string path_, partial_;
  int fd_ = -1;
  bool committed_ = false;
};

}  // namespace

void check_replaceable(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  GRAFT_CHECK(!std::filesystem::exists(status) || std::filesystem::is_regular_file(status),
              ExitCode::kData, path, ": cannot write: it is no regular file");
}

void write_file(const std::string& path, const std::function<void(const ByteSink&)>& fill) {
  PartialFile file(path);
  fill([&](std::span<const std::byte> bytes) { file.append(bytes); });
  file.commit();
}

}  // namespace graft::models::io
