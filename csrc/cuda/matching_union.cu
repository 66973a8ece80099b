// Union of the matchings of several prediction sets.
//
// One block: an image and 256 of its queries. An entry (set, target) belongs to the block of its query, one without a
// query to the first block of the image; so blocks share nothing and no memory is needed but the best candidate of each
// query, in shared memory. The first entry of a pair counts the others by reading its target's column and raises its
// query's candidate; a maximum of integers, exact in any order. Then entries are kept whose target is their query's
// candidate. Reads every entry once for each 256 queries, and columns from L1: sets squared times targets in all.
#include "../core/matching_union.h"
#include "launch.h"
#include "segments.h"

namespace detr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kQueries = 256;  // of a block

struct UnionLaunch {
  UnionArguments arguments;
  int parts;  // blocks of an image
};

// In how many sets the target has the query, if `set` is the first of them; otherwise 0.
__device__ __forceinline__ int sets_of_pair(const int32_t* column, int sets, int64_t stride, int set, int query) {
  for (int s = 0; s < set; ++s)
    if (column[s * stride] == query) return 0;
  int count = 1;
  for (int s = set + 1; s < sets; ++s) count += column[s * stride] == query;
  return count;
}

// The entries that a block looks at: the targets [low, high) of all sets.
struct Entries {
  const Batch& batch;
  Segment own;    // targets of the image
  int low, high;  // the first and the last image also write the rows that are no image's

  __device__ Entries(const Batch& batch, int image) : batch(batch), own(segment_of(batch, image)) {
    low = image == 0 ? 0 : own.begin;
    high = image + 1 == batch.images ? int(batch.targets) : own.end;
  }

  __device__ unsigned count() const { return unsigned(batch.layers) * unsigned(high - low); }
  __device__ int set(unsigned entry) const { return int(entry / unsigned(high - low)); }
  __device__ int target(unsigned entry) const { return low + int(entry % unsigned(high - low)); }
  __device__ int64_t place(unsigned entry) const { return set(entry) * batch.targets + target(entry); }

  // Or -1.
  __device__ int query(const int32_t* query_of_target, unsigned entry) const {
    const int target = this->target(entry), query = query_of_target[place(entry)];
    return query < batch.queries && target >= own.begin && target < own.end ? larger(query, -1) : -1;
  }
};

__global__ void __launch_bounds__(kThreads) unite_kernel(const UnionLaunch launch) {
  __shared__ long long candidate[kQueries];
  const UnionArguments& a = launch.arguments;
  const int part = int(blockIdx.x) % launch.parts, sets = int(a.batch.layers);
  const Entries entries(a.batch, int(blockIdx.x) / launch.parts);
  candidate[threadIdx.x] = 0;
  __syncthreads();
  for (unsigned e = threadIdx.x; e < entries.count(); e += kThreads) {
    const int query = entries.query(a.query_of_target, e);
    if ((query < 0 ? 0 : query / kQueries) != part) continue;
    const int target = entries.target(e);
    const int32_t* column = a.query_of_target + target;
    const int count = query < 0 ? 0 : sets_of_pair(column, sets, a.batch.targets, entries.set(e), query);
    if (count > 0) atomicMax(&candidate[query % kQueries], static_cast<long long>(candidate_of(count, target)));
    a.united[entries.place(e)] = count > 0 ? query : -1;
  }
  __syncthreads();
  for (unsigned e = threadIdx.x; e < entries.count(); e += kThreads) {
    const int query = entries.query(a.query_of_target, e);
    if (query < 0 || query / kQueries != part) continue;
    int32_t* united = a.united + entries.place(e);  // what this thread itself wrote
    if (*united >= 0 && !is_candidate_of(candidate[query % kQueries], entries.target(e))) *united = -1;
  }
}

}  // namespace

void unite(const UnionArguments& a, void* stream) {
  const int64_t parts = larger<int64_t>((a.batch.queries + kQueries - 1) / kQueries, 1);
  const int64_t blocks = a.batch.layers * a.batch.targets == 0 ? 0 : a.batch.images * parts;
  launch("unite", unite_kernel, blocks, kThreads, 0, stream, UnionLaunch{a, int(parts)});
}

}  // namespace detr::cuda
