// The part of libhdf5's C API that reader and writer of shards share: its lock, its handles, its
// errors.
#pragma once

#include <hdf5.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "configs/check.h"

namespace graft::data {

/// libhdf5 has one global state, and its own lock is a build option: one thread of the process at a
/// time. Inside, it prints no error itself and loads no filter plugin (a data file must not choose
/// code to run). A thread may hold it several times, and the child that it forks goes on holding
/// it.
class Hdf5Lock {
 public:
  Hdf5Lock();
  ~Hdf5Lock();
  Hdf5Lock(const Hdf5Lock&) = delete;
  Hdf5Lock& operator=(const Hdf5Lock&) = delete;
};

/// An object of libhdf5, closed when it goes.
class Hdf5Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Hdf5Handle() = default;
  Hdf5Handle(hid_t id, Close close) : id_(id), close_(close) {}
  Hdf5Handle(Hdf5Handle&& other) noexcept
      : id_(std::exchange(other.id_, H5I_INVALID_HID)), close_(other.close_) {}
  Hdf5Handle& operator=(Hdf5Handle&& other) noexcept;
  ~Hdf5Handle();
  hid_t get() const { return id_; }

 private:
  hid_t id_ = H5I_INVALID_HID;
  Close close_ = nullptr;
};

/// The cause of the last failure in the library's own words; clears its error stack.
std::string hdf5_message();

/// Passes on a result of the C API; a negative one is an Error (kData): "WHERE: cannot ACTION: the
/// cause".
template <class Result>
Result checked(Result result, std::string_view where, std::string_view action) {
  GRAFT_CHECK(result >= 0, ExitCode::kData, where, ": cannot ", action, ": ", hdf5_message());
  return result;
}

/// The type of a number in memory.
template <class Number>
hid_t native_type() {
  if constexpr (std::is_same_v<Number, uint8_t>) return H5T_NATIVE_UINT8;
  if constexpr (std::is_same_v<Number, int32_t>) return H5T_NATIVE_INT32;
  if constexpr (std::is_same_v<Number, uint32_t>) return H5T_NATIVE_UINT32;
  if constexpr (std::is_same_v<Number, uint64_t>) return H5T_NATIVE_UINT64;
}

}  // namespace graft::data
