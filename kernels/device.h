// The only place that asks "CPU or CUDA?" and the only #ifdef of the kernels. A kernel's x.cpp
// unwraps its tensors and calls on_device(t, cpu_fn, GRAFT_CUDA(cuda_fn)); x_cpu.cpp and x_cuda.cu
// take raw pointers. The header itself includes no LibTorch in a CPU build nor under nvcc, so all
// four files of a kernel may include it.
#pragma once

#include <type_traits>

#include "configs/check.h"

#ifdef GRAFT_WITH_CUDA
#include <cuda_runtime_api.h>
#ifndef __CUDACC__
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif
/// The CUDA branch of on_device: a callable that takes a Stream. Null in a CPU build, where it is
/// not even compiled.
#define GRAFT_CUDA(...) (__VA_ARGS__)
#else
#define GRAFT_CUDA(...) nullptr
#endif

#ifndef __host__  // shared arithmetic is marked for both compilers
#define __host__
#define __device__
#endif

struct CUstream_st;

/// CUDA_CHECK(call): throws graft::Error (kBug) naming the call and CUDA's reason.
#define CUDA_CHECK(call)                                                                  \
  do {                                                                                    \
    const cudaError_t status_ = (call);                                                   \
    GRAFT_CHECK(status_ == cudaSuccess, ::graft::ExitCode::kBug, __FILE__, ":", __LINE__, \
                ": " #call " failed: ", cudaGetErrorString(status_));                     \
  } while (false)

/// NCCL_CHECK(call): throws graft::Error (kCommunication) naming the call and NCCL's reason. Needs
/// <nccl.h>.
#define NCCL_CHECK(call)                                                    \
  do {                                                                      \
    const ncclResult_t status_ = (call);                                    \
    GRAFT_CHECK(status_ == ncclSuccess || status_ == ncclInProgress,        \
                ::graft::ExitCode::kCommunication, __FILE__, ":", __LINE__, \
                ": " #call " failed: ", ncclGetErrorString(status_));       \
  } while (false)

namespace graft::kernels {

using Stream = CUstream_st*;  ///< cudaStream_t, nameable without a CUDA toolkit

/// Runs the back end of the device that `tensor` lives on.
/// @param cpu_fn   callable without arguments
/// @param cuda_fn  GRAFT_CUDA(callable that takes the current Stream of the tensor's device)
/// @throws graft::Error if the tensor is on a device that this build does not have
template <class Tensor, class CpuFn, class CudaFn>
void on_device(const Tensor& tensor, const CpuFn& cpu_fn, [[maybe_unused]] const CudaFn& cuda_fn) {
  if (tensor.is_cpu()) return cpu_fn();
#if defined(GRAFT_WITH_CUDA) && !defined(__CUDACC__)
  GRAFT_CHECK(tensor.is_cuda(), "no kernel for device ", tensor.device(), "; use cpu or cuda");
  const c10::cuda::CUDAGuard guard(tensor.device());
  cuda_fn(c10::cuda::getCurrentCUDAStream().stream());
#else
  GRAFT_CHECK(false, "a tensor is on ", tensor.device(),
              ", but graft was built without CUDA; build with the preset cuda");
#endif
}

}  // namespace graft::kernels
