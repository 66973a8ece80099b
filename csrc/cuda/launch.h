// Launching kernels. A launch is a plain function call, so that g++ compiles these files as well and the emulator in
// tests/ runs them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace detr::cuda {

// Shared memory whose size is chosen at the launch.
extern __shared__ __align__(16) unsigned char dynamic_shared[];

inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(error));
}

// More than any kernel declares; a test reads the built kernels.
constexpr size_t kMostStaticShared = 2048;

inline int attribute_of_device(cudaDeviceAttr attribute, const char* kernel) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&value, attribute, device), kernel);
  return value;
}

// Shared memory that a block may ask for on the current device, beside what its kernel declares.
inline size_t shared_memory_limit(const char* kernel) {
  return attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin, kernel) - kMostStaticShared;
}

// Enqueues a kernel on a stream of the current device; no blocks, no launch.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            void* stream, Arguments&&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string("CUDA kernel ") + name + ": the batch is too large");
  // Beyond 48 KiB in all a kernel must be allowed to; always the same number, so that calls of other sizes, in other
  // threads or captured in graphs, keep their right.
  if (shared_bytes + kMostStaticShared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_memory_limit(name))),
          name);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace detr::cuda
