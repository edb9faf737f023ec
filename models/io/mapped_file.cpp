#include "models/io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "configs/check.h"

namespace graft::models::io {

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a pipe must fail the check below, not wait for its writer.
  file_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  GRAFT_CHECK(file_ >= 0, ExitCode::kData, path_, ": cannot open: ", std::strerror(errno));
  try {
    map();
  } catch (...) {
    ::close(file_);
    throw;
  }
}

void MappedFile::map() {
  struct stat status {};
  GRAFT_CHECK(::fstat(file_, &status) == 0, ExitCode::kData, path_, ": ", std::strerror(errno));
  GRAFT_CHECK(S_ISREG(status.st_mode), ExitCode::kData, path_, ": not a regular file");
  size_ = static_cast<size_t>(status.st_size);
  if (size_ == 0) return;  // mmap refuses an empty range; an empty view is what it means
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file_, 0);
  GRAFT_CHECK(data != MAP_FAILED, ExitCode::kData, path_, ": cannot map: ", std::strerror(errno));
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  if (file_ >= 0) ::close(file_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

void MappedFile::read(uint64_t offset, std::span<std::byte> out) const {
  GRAFT_CHECK(offset <= size_ && out.size() <= size_ - offset, ExitCode::kData, path_, ": bytes ",
              offset, " + ", out.size(), " reach past the end (", size_,
              " bytes); is the file cut short?");
  while (!out.empty()) {
    const ssize_t got = ::pread(file_, out.data(), out.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    GRAFT_CHECK(got >= 0, ExitCode::kData, path_, ": cannot read: ", std::strerror(errno));
    GRAFT_CHECK(got > 0, ExitCode::kData, path_, ": ends at byte ", offset, " of ", size_,
                "; it was cut short while it was read");
    offset += static_cast<uint64_t>(got);
    out = out.subspan(static_cast<size_t>(got));
  }
}

bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

}  // namespace graft::models::io
