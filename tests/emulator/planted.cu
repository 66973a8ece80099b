// Kernels with one planted fault each, and the same kernels without it: what the emulator must report, and must not.
#include <stdexcept>

#include "../../csrc/cuda/group.h"
#include "../../csrc/cuda/launch.h"
#include "planted.h"

namespace planted {
namespace {

using detr::cuda::kAllLanes;

enum class Fault { kNone, kMissingBarrier, kNoCounter };

// Every thread reads what its neighbour in the next warp wrote.
template <Fault fault>
__global__ void exchange_in_block(int* result) {
  __shared__ int values[64];
  const int own = int(threadIdx.x);
  values[own] = own;
  if constexpr (fault == Fault::kNone) __syncthreads();
  const int other = values[(own + 32) % 64];
  if (own == 0) *result = other;
}

// Lane 0 writes what the others still read: shuffles order nothing, __syncwarp does.
template <Fault fault>
__global__ void overwrite_in_warp(int* result) {
  __shared__ int value;
  const int lane = int(threadIdx.x);
  if (lane == 0) value = 7;
  __syncwarp();
  const int seen = value;
  const unsigned all = __reduce_min_sync(kAllLanes, unsigned(seen));
  if constexpr (fault == Fault::kNone) __syncwarp();
  if (lane == 0) value = 8;
  if (lane == 31) *result = int(all);
}

__global__ void divergent_block(int* result) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x == 63) *result = 1;
  if (threadIdx.x >= 32) __syncthreads();
}

__global__ void some_never_arrive(int* result) {
  if (threadIdx.x < 16) __syncwarp();
  if (threadIdx.x == 0) *result = 1;
}

__global__ void exited_lanes(int* result) {
  if (threadIdx.x >= 16) return;
  if (__shfl_sync(kAllLanes, 1, 0) == 1 && threadIdx.x == 0) *result = 1;
}

__global__ void past_shared_memory(int* result) {
  int* memory = reinterpret_cast<int*>(detr::cuda::dynamic_shared);
  memory[threadIdx.x] = 1;
  if (threadIdx.x == 0) *result = memory[0];
}

__global__ void unwritten_memory(int* result) {
  __shared__ float value;
  if (result == nullptr) value = 0;
  const float* memory = reinterpret_cast<const float*>(detr::cuda::dynamic_shared);
  *result = int(value != value) + int(memory[3] != memory[3]);
}

// The last block reads what the others wrote.
template <Fault fault>
__global__ void last_block(int* values, unsigned* arrived, int* result) {
  values[blockIdx.x] = 1;
  if constexpr (fault == Fault::kNone) __threadfence();
  if constexpr (fault == Fault::kNoCounter) {
    if (blockIdx.x != 3) return;  // which need not be the last to run
  } else {
    if (atomicAdd(arrived, 1u) != 3) return;
  }
  *result = values[0] + values[1] + values[2] + values[3];
}

// Each block reads its neighbour's number and writes its own.
__global__ void exchange_between_blocks(int* values) {
  const int other = values[(blockIdx.x + 1) % 4];
  values[blockIdx.x] = other + 1;
}

// 47 KiB and what the kernel declares are more than the 48 KiB that a launch has without asking.
void start_without_leave(int* result) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 47 * 1024;
  detr::cuda::check(cudaLaunchKernelEx(&config, exited_lanes, result), "planted");
}

}  // namespace

int run(const std::string& name) {
  int result = 0, values[4] = {};
  unsigned arrived = 0;
  using detr::cuda::launch;
  const auto start = [&](auto kernel, int threads, size_t shared_bytes = 0) {
    launch("planted", kernel, 1, threads, shared_bytes, nullptr, &result);
  };
  if (name == "sound exchange")
    start(exchange_in_block<Fault::kNone>, 64);
  else if (name == "missing __syncthreads")
    start(exchange_in_block<Fault::kMissingBarrier>, 64);
  else if (name == "sound overwrite")
    start(overwrite_in_warp<Fault::kNone>, 32);
  else if (name == "missing __syncwarp")
    start(overwrite_in_warp<Fault::kMissingBarrier>, 32);
  else if (name == "divergent __syncthreads")
    start(divergent_block, 64);
  else if (name == "half of a warp")
    start(some_never_arrive, 32);
  else if (name == "exited lanes")
    start(exited_lanes, 32);
  else if (name == "past shared memory")
    start(past_shared_memory, 32, 31 * sizeof(int));
  else if (name == "unwritten memory")
    start(unwritten_memory, 1, 16);
  else if (name == "sound last block")
    launch("planted", last_block<Fault::kNone>, 4, 1, 0, nullptr, values, &arrived, &result);
  else if (name == "missing __threadfence")
    launch("planted", last_block<Fault::kMissingBarrier>, 4, 1, 0, nullptr, values, &arrived, &result);
  else if (name == "no counter of blocks")
    launch("planted", last_block<Fault::kNoCounter>, 4, 1, 0, nullptr, values, &arrived, &result);
  else if (name == "exchange between blocks")
    launch("planted", exchange_between_blocks, 4, 1, 0, nullptr, values);
  else if (name == "shared memory without leave")
    start_without_leave(&result);
  else if (name == "too many threads")
    start(exchange_in_block<Fault::kNone>, 2048);
  else
    throw std::invalid_argument("no planted kernel " + name);
  return result;
}

}  // namespace planted
