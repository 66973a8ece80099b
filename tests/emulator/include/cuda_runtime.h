// CUDA on the CPU, as far as csrc/cuda/*.cu use it: g++ finds this file in place of the toolkit's and compiles the
// kernels unmodified. emulator.cpp runs every thread of a block as a fibre, one block after the other.
//
// Reported as exceptions: barriers that not all threads reach or that they reach at different places, collectives with
// exited or differing lanes, races on shared and global memory (where the kernels are compiled with
// -fsanitize=thread, whose calls emulator.cpp answers itself), and shared memory past what the launch asked for.
// Shared memory starts as NaN. The order of threads between barriers is shuffled by a seed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One copy for each host thread, and the only variables of their kind: so they can be found and filled with NaN.
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Indices {
  uint3 thread, block;
};
extern Indices indices;  // of the thread that runs

using Place = std::source_location;

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
// What a lane gets out of the values of all lanes.
using Combine = uint64_t (*)(const uint64_t* values, unsigned mask, int lane, int argument);
uint64_t exchange(unsigned mask, uint64_t value, const char* name, Place, Combine, int argument);
void sync_block(Place);
void sync_warp(unsigned mask, Place);
void fence();

template <typename To, typename From>
To bits(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof from < sizeof to ? sizeof from : sizeof to);
  return to;
}

}  // namespace emulator

#define threadIdx emulator::indices.thread
#define blockIdx emulator::indices.block
extern dim3 blockDim, gridDim;

inline void __syncthreads(emulator::Place place = emulator::Place::current()) { emulator::sync_block(place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Place place = emulator::Place::current()) {
  emulator::sync_warp(mask, place);
}
inline void __threadfence() { emulator::fence(); }

template <typename T>
T __shfl_sync(unsigned mask, T x, int lane, int = 32, emulator::Place place = emulator::Place::current()) {
  const auto pick = [](const uint64_t* values, unsigned, int, int source) { return values[source & 31]; };
  return emulator::bits<T>(emulator::exchange(mask, emulator::bits<uint64_t>(x), "__shfl_sync", place, pick, lane));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int distance, int = 32, emulator::Place place = emulator::Place::current()) {
  const auto pick = [](const uint64_t* values, unsigned, int lane, int d) { return values[lane ^ d]; };
  return emulator::bits<T>(
      emulator::exchange(mask, emulator::bits<uint64_t>(x), "__shfl_xor_sync", place, pick, distance));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  const auto vote = [](const uint64_t* values, unsigned mask, int, int) {
    uint64_t result = 0;
    for (int k = 0; k < 32; ++k) result |= (mask >> k & 1) && values[k] ? uint64_t(1) << k : 0;
    return result;
  };
  return unsigned(emulator::exchange(mask, predicate != 0, "__ballot_sync", place, vote, 0));
}
inline int __any_sync(unsigned mask, int predicate, emulator::Place place = emulator::Place::current()) {
  return __ballot_sync(mask, predicate, place) != 0;
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned x, emulator::Place place = emulator::Place::current()) {
  const auto least = [](const uint64_t* values, unsigned mask, int, int) {
    uint64_t result = ~0u;
    for (int k = 0; k < 32; ++k)
      if ((mask >> k & 1) && values[k] < result) result = values[k];
    return result;
  };
  return unsigned(emulator::exchange(mask, x, "__reduce_min_sync", place, least, 0));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x, emulator::Place place = emulator::Place::current()) {
  const auto sum = [](const uint64_t* values, unsigned mask, int, int) {
    uint64_t result = 0;
    for (int k = 0; k < 32; ++k) result += mask >> k & 1 ? values[k] : 0;
    return result;
  };
  return unsigned(emulator::exchange(mask, x, "__reduce_add_sync", place, sum, 0));
}

int atomicMin(int* address, int x);
int atomicMax(int* address, int x);
long long atomicMax(long long* address, long long x);
unsigned atomicAdd(unsigned* address, unsigned x);
unsigned long long atomicAdd(unsigned long long* address, unsigned long long x);

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }

// ---- the runtime library --------------------------------------------------------------------------------------------

typedef struct emulated_stream* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream);
bool emulated_launch_is_valid(const cudaLaunchConfig_t& config, const void* kernel);

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  if (!emulated_launch_is_valid(*config, reinterpret_cast<const void*>(kernel))) return cudaErrorInvalidValue;
  const std::tuple<Parameters...> arguments(given...);
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, arguments); });
  return cudaSuccess;
}
