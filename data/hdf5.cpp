#include "data/hdf5.h"

#include <mutex>

namespace graft::data {
namespace {

std::mutex library_mutex;

/// How often this thread holds the mutex. A std::recursive_mutex would remember the thread by its
/// number, which is another one in a forked child.
thread_local int times_held = 0;

}  // namespace

Hdf5Lock::Hdf5Lock() {
  if (times_held++ == 0) library_mutex.lock();
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // a setting of the thread, so set on every entry
  H5PLset_loading_state(0);
}

Hdf5Lock::~Hdf5Lock() {
  if (--times_held == 0) library_mutex.unlock();
}

Hdf5Handle& Hdf5Handle::operator=(Hdf5Handle&& other) noexcept {
  std::swap(id_, other.id_);
  std::swap(close_, other.close_);
  return *this;
}

Hdf5Handle::~Hdf5Handle() {
  if (id_ < 0) return;
  Hdf5Lock lock;
  close_(id_);
}

std::string hdf5_message() {
  std::string message = "unknown error";
  const auto keep_innermost = [](unsigned n, const H5E_error2_t* error, void* out) -> herr_t {
    if (n == 0 && error->desc) *static_cast<std::string*>(out) = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_innermost, &message);
  H5Eclear2(H5E_DEFAULT);
  return message;
}

}  // namespace graft::data
