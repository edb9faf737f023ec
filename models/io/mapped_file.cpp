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
namespace {

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

MappedFile::MappedFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a pipe must fail the check below, not wait for its writer.
  const Descriptor file{::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  GRAFT_CHECK(file.fd >= 0, ExitCode::kData, path_, ": cannot open: ", std::strerror(errno));
  struct stat status {};
  GRAFT_CHECK(::fstat(file.fd, &status) == 0, ExitCode::kData, path_, ": ", std::strerror(errno));
  GRAFT_CHECK(S_ISREG(status.st_mode), ExitCode::kData, path_, ": not a regular file");
  size_ = static_cast<size_t>(status.st_size);
  if (size_ == 0) return;  // mmap refuses an empty range; an empty view is what it means
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.fd, 0);
  GRAFT_CHECK(data != MAP_FAILED, ExitCode::kData, path_, ": cannot map: ", std::strerror(errno));
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

std::span<const std::byte> MappedFile::view(uint64_t offset, uint64_t size) const {
  GRAFT_CHECK(offset <= size_ && size <= size_ - offset, ExitCode::kData, path_, ": bytes ", offset,
              " + ", size, " reach past the end (", size_, " bytes); is the file cut short?");
  return bytes().subspan(offset, size);
}

bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

}  // namespace graft::models::io
