// Minimum-cost assignment by shortest augmenting paths on compact slots: the algorithm, the rounding and the ties of
// cpu/assignment.h, so the same prices and the same assignment, bit for bit.
//
// One block solves one problem, images with many targets first. All warps look for the row minima and start greedily;
// without conflicts, which is a trained detector's case, the block is done. Otherwise one warp searches: lane l holds
// the slots l, l + 32, ... in registers (up to 256 rows), their costs lie in shared memory. More rows, or double, or
// more targets than queries, are searched by the whole block with its state in shared memory, or in global memory if
// that is too small. Three kernels, for the most targets of an image: 64, 256, any.
//
// A scan costs ceil(slots / 32) steps of a lane and two minima over the warp; looking for a row's best free column
// again reads its costs from L2. Limits: the scan's latency, not the device's throughput.
#include <algorithm>

#include "assignment_search.h"
#include "launch.h"
#include "segments.h"

namespace detr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRegisterRows = 256;  // most rows whose search is kept in registers
constexpr int kAnyRows = INT32_MAX;

// Image that comes `rank`-th when those with most targets come first; of at most as many images as a block has threads.
__device__ int ranked_image(const Batch& batch, int rank) {
  __shared__ int32_t count[kThreads];
  __shared__ int chosen;
  const int images = int(batch.images), own = int(threadIdx.x);
  if (own < images) {
    const Segment segment = segment_of(batch, own);
    count[own] = segment.end - segment.begin;
  }
  __syncthreads();
  if (own < images) {
    int before = 0;
    for (int b = 0; b < images; ++b) before += count[b] > count[own] || (count[b] == count[own] && b < own);
    if (before == rank) chosen = own;
  }
  __syncthreads();
  return chosen;
}

// Where this thread's item goes among those that are kept, in the order of threads; adds their number to `total`.
__device__ __forceinline__ int position_in_block(bool kept, int* total) {
  __shared__ int kept_in_warp[kThreads / kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned mask = __ballot_sync(kAllLanes, kept);
  if (lane == 0) kept_in_warp[warp] = __popc(mask);
  __syncthreads();
  int position = *total + __popc(mask & ((1u << lane) - 1));
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    if (w < warp) position += kept_in_warp[w];
    *total += kept_in_warp[w];
  }
  __syncthreads();
  return position;
}

struct Counts {
  int slots, waiting;
};

// Every row takes its cheapest column if no lower row wants it; the others wait.
template <typename T, bool kStrided>
__device__ Counts start_greedily(const CostView<T, kStrided>& view, const Workspace<T>& ws) {
  for (int j = threadIdx.x; j < view.columns; j += kThreads) ws.owner[j] = kFree;
  __syncthreads();  // for the row minima as well
  for (int i = threadIdx.x; i < view.rows; i += kThreads)
    if (ws.best_column[i] >= 0) atomicMin(&ws.owner[ws.best_column[i]], i);
  __syncthreads();
  Counts counts = {0, 0};
  for (int start = 0; start < view.rows; start += kThreads) {
    const int i = start + int(threadIdx.x);
    const int column = i < view.rows ? ws.best_column[i] : -1;
    const bool wins = column >= 0 && ws.owner[column] == i;
    const int slot = position_in_block(wins, &counts.slots);
    const int place = position_in_block(column >= 0 && !wins, &counts.waiting);
    if (wins) {
      ws.slot[slot] = {ws.lowest_cost[i], i};
      ws.column_of_slot[slot] = column;
      ws.price[slot] = 0;
    } else if (column >= 0) {
      ws.waiting[place] = i;
    }
  }
  __syncthreads();
  return counts;
}

// Row minima from what the cost kernel left for every 32 queries, a row by eight lanes.
__device__ __forceinline__ void read_minima(const uint64_t* minima,  // [rows, segments], rows `stride` apart
                                            int stride, int segments, int rows, const Workspace<float>& ws) {
  constexpr int kLanes = 8;
  const int lane = threadIdx.x % kLanes;
  for (int start = 0; start < rows; start += kThreads / kLanes) {
    const int i = start + int(threadIdx.x) / kLanes;
    const uint64_t* own = minima + int64_t(smaller(i, rows - 1)) * stride;
    uint64_t least = ~uint64_t(0);
    for (int s = lane; s < segments; s += kLanes) least = smaller(own[s], least);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      least = smaller(__shfl_xor_sync(kAllLanes, least, distance), least);
    if (lane != 0 || i >= rows) continue;
    const float cost = from_ordered<float>(uint32_t(least >> 32));
    const bool found = cost < kInfinity<float>;
    ws.best_cost[i] = ws.lowest_cost[i] = found ? cost : kInfinity<float>;
    ws.best_column[i] = found ? int32_t(uint32_t(least)) : -1;
  }
}

template <typename T, bool kStrided>
__device__ void find_minima(const CostView<T, kStrided>& view, const Workspace<T>& ws) {
  Warp warp = {int(threadIdx.x) % kWarpSize};
  for (int i = threadIdx.x / kWarpSize; i < view.rows; i += kThreads / kWarpSize) {
    const Nearest<T> nearest = nearest_column<false>(warp, view, i, nullptr);
    if (warp.rank != 0) continue;
    ws.best_cost[i] = ws.lowest_cost[i] = nearest.cost;
    ws.best_column[i] = nearest.column;
  }
}

// The searches by the first warp; gathered [rows, rows | 1], or null with kGathered = false.
template <int R, bool kGathered>
__device__ __forceinline__ int search_in_registers(const CostView<float, false>& view, const Workspace<float>& ws,
                                                   float* gathered, Counts counts) {
  const Warp warp = {int(threadIdx.x)};
  return Search<float, false, Warp, R, kGathered>(warp, view, ws, gathered, view.rows | 1, counts.slots)
      .run(counts.waiting);
}

__host__ __device__ constexpr size_t gathered_bytes(int64_t rows) { return rows * (rows | 1) * sizeof(float); }

// Costs of all rows at the slots' columns.
__device__ void gather_costs(const CostView<float, false>& view, const Workspace<float>& ws, int slots,
                             float* gathered) {
  const int warp = threadIdx.x / kWarpSize;
  for (int k = threadIdx.x % kWarpSize; k < slots; k += kWarpSize)
    gather_column<kThreads / kWarpSize>(view, ws.column_of_slot[k], k, warp, gathered, view.rows | 1);
  __syncthreads();
}

template <typename T>
struct AssignLaunch {
  AssignmentArguments<T> arguments;
  const uint64_t* minima;  // [L, T, G, segments] packed cost and query, or null
  int segments;
  unsigned char* scratch;  // [L, B, G, scratch_bytes], for problems that do not fit shared memory
  size_t scratch_bytes, shared_bytes;
  bool heavy_first;  // more blocks than the device runs at once
};

// One problem and where its results go.
template <typename T>
struct Problem {
  const T* cost;      // [targets, queries], rows `stride` apart
  int64_t first_row;  // of the costs of all layers
  int group, targets, queries, stride, first_query;
  bool transposed;           // rows are queries
  int32_t* query_of_target;  // [targets]
  T *target_price, *query_price;

  __device__ Problem(const AssignmentArguments<T>& a, int layer, int image, int number_of_group) {
    const Batch& batch = a.batch;
    const int groups = int(a.groups);
    group = number_of_group;
    const Segment segment = segment_of(batch, image);
    targets = segment.end - segment.begin;
    stride = int(batch.queries);
    queries = stride / groups;
    first_query = group * queries;
    transposed = targets > queries;
    first_row = layer * batch.targets + segment.begin;
    cost = a.cost + first_row * stride + first_query;
    const int64_t result = first_row * groups + int64_t(group) * targets;
    query_of_target = a.query_of_target + result;
    target_price = a.target_price ? a.target_price + result : nullptr;
    query_price = a.query_price ? a.query_price + (layer * batch.images + image) * stride + first_query : nullptr;
  }

  __device__ int rows() const { return transposed ? queries : targets; }
  __device__ int columns() const { return transposed ? targets : queries; }

  template <bool kStrided>
  __device__ CostView<T, kStrided> view() const {
    return {cost, rows(), columns(), transposed ? 1 : stride, transposed ? stride : 1};
  }

  // By the threads rank, rank + size, ...; the arrays are -1 and 0 before.
  __device__ __forceinline__ void write(const Workspace<T>& ws, int slots, int rank, int size) const {
    T* row_price = transposed ? query_price : target_price;
    T* column_price = transposed ? target_price : query_price;
    for (int k = rank; k < slots; k += size) {
      const Slot<T> slot = ws.slot[k];
      const int column = ws.column_of_slot[k];
      query_of_target[transposed ? column : slot.row] = first_query + (transposed ? slot.row : column);
      if (row_price) row_price[slot.row] = slot.row_price;
      if (column_price) column_price[column] = ws.price[k];
    }
  }
};

// Up to 256 rows: a warp searches, slots in registers.
template <int kMostRows>
__device__ __forceinline__ void solve_by_warp(const AssignLaunch<float>& launch, const Problem<float>& problem,
                                              size_t workspace_bytes) {
  const auto view = problem.view<false>();
  const Workspace<float> ws(dynamic_shared, view.rows);
  if (launch.minima) {
    const int stride = int(launch.arguments.groups) * launch.segments;
    const uint64_t* minima = launch.minima + problem.first_row * stride + problem.group * launch.segments;
    read_minima(minima, stride, launch.segments, view.rows, ws);
  } else {
    find_minima(view, ws);
  }
  const Counts counts = start_greedily(view, ws);
  if (counts.waiting == 0) return problem.write(ws, counts.slots, int(threadIdx.x), kThreads);
  float* gathered = reinterpret_cast<float*>(dynamic_shared + workspace_bytes);
  const bool fits = kMostRows != kAnyRows || workspace_bytes + gathered_bytes(view.rows) <= launch.shared_bytes;
  if (fits) gather_costs(view, ws, counts.slots, gathered);
  if (threadIdx.x >= kWarpSize) return;
  int slots;
  if constexpr (kMostRows == 64) {
    slots = view.rows <= 32 ? search_in_registers<1, true>(view, ws, gathered, counts)
                            : search_in_registers<2, true>(view, ws, gathered, counts);
  } else if constexpr (kMostRows == kRegisterRows) {
    slots = view.rows <= 64    ? search_in_registers<2, true>(view, ws, gathered, counts)
            : view.rows <= 128 ? search_in_registers<4, true>(view, ws, gathered, counts)
                               : search_in_registers<8, true>(view, ws, gathered, counts);
  } else {
    slots = fits ? search_in_registers<8, true>(view, ws, gathered, counts)
                 : search_in_registers<8, false>(view, ws, nullptr, counts);
  }
  problem.write(ws, slots, int(threadIdx.x), kWarpSize);
}

template <typename T>
__device__ __forceinline__ void solve_by_block(const Problem<T>& problem, unsigned char* memory) {
  __shared__ uint32_t parts[2][kThreads / kWarpSize];
  const auto view = problem.template view<true>();
  const Workspace<T> ws(memory, view.rows);
  find_minima(view, ws);
  const Counts counts = start_greedily(view, ws);
  int slots = counts.slots;
  if (counts.waiting > 0) {
    const Block<kThreads> block = {int(threadIdx.x), parts};
    slots = Search<T, true, Block<kThreads>, 0, false>(block, view, ws, nullptr, 0, slots).run(counts.waiting);
  }
  problem.write(ws, slots, int(threadIdx.x), kThreads);
}

// For images with at most kMostRows targets, and none with more targets than queries; or kAnyRows.
template <typename T, int kMostRows>
__global__ void __launch_bounds__(kThreads, kMostRows == kAnyRows ? 1 : 2) assign_kernel(const AssignLaunch<T> launch) {
  const AssignmentArguments<T>& a = launch.arguments;
  const Batch& batch = a.batch;
  const unsigned layers = unsigned(batch.layers), groups = unsigned(a.groups);
  const unsigned layer = blockIdx.x % layers, group = blockIdx.x / layers % groups;
  const int number_of_image = int(blockIdx.x / layers / groups);
  const int image = launch.heavy_first ? ranked_image(batch, number_of_image) : number_of_image;
  const Problem<T> problem(a, int(layer), image, int(group));
  for (int t = threadIdx.x; t < problem.targets; t += kThreads) problem.query_of_target[t] = -1;
  if (image + 1 == batch.images && group == 0)  // rows past the last offset
    for (int64_t t = end_of_targets(batch) * a.groups + int(threadIdx.x); t < batch.targets * a.groups; t += kThreads)
      a.query_of_target[layer * batch.targets * a.groups + t] = -1;
  if (problem.rows() == 0) return;

  const size_t bytes = Workspace<T>::bytes(problem.rows(), problem.columns());
  const bool in_shared = bytes <= launch.shared_bytes;
  // Images with more targets than max_count are left unmatched: there is no room for them.
  if constexpr (kMostRows != kAnyRows) {
    if (problem.transposed || bytes + gathered_bytes(problem.rows()) > launch.shared_bytes) return;
    if (problem.rows() <= kMostRows) solve_by_warp<kMostRows>(launch, problem, bytes);
  } else {
    if (!in_shared && bytes > launch.scratch_bytes) return;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (in_shared && !problem.transposed && problem.rows() <= kRegisterRows)
        return solve_by_warp<kMostRows>(launch, problem, bytes);
    }
    const int64_t number = (layer * batch.images + image) * a.groups + group;
    solve_by_block(problem, in_shared ? dynamic_shared : launch.scratch + number * launch.scratch_bytes);
  }
}

template <typename T>
AssignLaunch<T> launch_of(const AssignmentArguments<T>& a, const uint64_t* minima, const AssignPlan& plan,
                          void* scratch) {
  const int64_t blocks = a.batch.layers * a.batch.images * a.groups;
  const bool heavy_first =
      a.batch.images <= kThreads && blocks > 2 * attribute_of_device(cudaDevAttrMultiProcessorCount, "assign");
  return {a,
          minima,
          static_cast<int>(minima_segments(a.batch.queries / a.groups)),
          static_cast<unsigned char*>(scratch),
          plan.scratch_bytes,
          plan.shared_bytes,
          heavy_first};
}

}  // namespace

AssignPlan assign_plan(const Batch& batch, int64_t groups, int64_t max_count, ElementType type) {
  max_count = std::min(max_count, batch.targets);
  const int64_t queries = batch.queries / groups;
  const int64_t rows = std::min(max_count, queries), columns = std::max(max_count, queries);
  const size_t limit = shared_memory_limit("assign");
  if (type == ElementType::kFloat64) {
    const size_t bytes = Workspace<double>::bytes(rows, columns);
    return {kAnyRows, std::min(bytes, limit), bytes <= limit ? 0 : (bytes + 15) / 16 * 16};
  }
  const int64_t small = std::min<int64_t>(rows, kRegisterRows);
  const size_t searched_by_warp = Workspace<float>::bytes(small, columns) + gathered_bytes(small);
  if (max_count <= queries && rows <= kRegisterRows && searched_by_warp <= limit)
    return {rows <= 64 ? 64 : kRegisterRows, searched_by_warp, 0};
  const size_t bytes = Workspace<float>::bytes(rows, columns);
  return {kAnyRows, std::min(std::max(bytes, searched_by_warp), limit), bytes <= limit ? 0 : (bytes + 15) / 16 * 16};
}

void assign(const AssignmentArguments<float>& a, const uint64_t* minima, const AssignPlan& plan, void* scratch,
            void* stream) {
  const auto start = [&](auto kernel) {
    launch("assign", kernel, a.batch.layers * a.batch.images * a.groups, kThreads, plan.shared_bytes, stream,
           launch_of(a, minima, plan, scratch));
  };
  if (plan.most_rows == 64) return start(assign_kernel<float, 64>);
  if (plan.most_rows == kRegisterRows) return start(assign_kernel<float, kRegisterRows>);
  start(assign_kernel<float, kAnyRows>);
}

void assign(const AssignmentArguments<double>& a, const uint64_t* minima, const AssignPlan& plan, void* scratch,
            void* stream) {
  launch("assign", assign_kernel<double, kAnyRows>, a.batch.layers * a.batch.images * a.groups, kThreads,
         plan.shared_bytes, stream, launch_of(a, minima, plan, scratch));
}

}  // namespace detr::cuda
