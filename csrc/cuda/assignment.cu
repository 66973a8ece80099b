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

#include "../kernels.h"
#include "group.h"
#include "launch.h"

namespace detr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRegisterRows = 256;  // most rows whose search is kept in registers
constexpr int kAnyRows = INT32_MAX;
constexpr int32_t kFree = INT32_MAX;
constexpr int kRoot = -1;

template <typename T>
__device__ __forceinline__ T allowed_or_infinite(T cost) {
  return fabs(cost) < kCostLimit<T> ? cost : kInfinity<T>;
}

// A problem with rows <= columns. Forbidden costs read as +infinity. Columns are neighbours in memory, or, kStrided,
// anything apart.
template <typename T, bool kStrided>
struct CostView {
  const T* cost;
  int rows, columns, row_stride, column_stride;

  __device__ __forceinline__ T stored(int row, int column) const {
    const int64_t step = kStrided ? column_stride : 1, stride = kStrided ? row_stride : columns;
    return cost[row * stride + column * step];
  }
  __device__ __forceinline__ T at(int row, int column) const { return allowed_or_infinite(stored(row, column)); }
};

template <typename T>
struct Nearest {
  T cost;
  int column;  // -1 = none
};

// A row's cheapest column, of all or of the free ones; the lowest of equal ones. Four loads are under way at a time:
// the barrier keeps the compiler from waiting for one before it starts the next.
template <bool kOnlyFree, typename T, bool kStrided, typename Group>
__device__ __forceinline__ Nearest<T> nearest_column(Group& group, const CostView<T, kStrided>& view, int row,
                                                     const int32_t* owner) {
  constexpr int kLoads = 4;
  Nearest<T> own = {kInfinity<T>, -1};
#pragma unroll 1
  for (int start = 0; start < view.columns; start += kLoads * Group::kSize) {
    T cost[kLoads];
    int32_t taken_by[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int column = start + k * Group::kSize + group.rank;
      cost[k] = column < view.columns ? view.stored(row, column) : kInfinity<T>;
      taken_by[k] = kOnlyFree && column < view.columns ? owner[column] : kFree;
    }
    group.sync();
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const bool better = (cost[k] < own.cost) & (fabs(cost[k]) < kCostLimit<T>)&(taken_by[k] == kFree);
      own.cost = better ? cost[k] : own.cost;
      own.column = better ? start + k * Group::kSize + group.rank : own.column;
    }
  }
  const Bits<T> least = group.min(ordered(own.cost));
  const T cost = from_ordered<T>(least);
  const uint32_t column = group.min(own.cost == cost ? uint32_t(own.column) : ~0u);
  return {cost, int(column)};
}

// Costs of the rows first, first + kStep, ... at a column, into gathered [rows, leading] at its slot. Four loads are
// under way at a time.
template <int kStep, bool kStrided>
__device__ __forceinline__ void gather_column(const CostView<float, kStrided>& view, int column, int slot, int first,
                                              float* gathered, int leading) {
  constexpr int kLoads = 4;
  for (int start = first; start < view.rows; start += kLoads * kStep) {
    float cost[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) cost[k] = view.stored(smaller(start + k * kStep, view.rows - 1), column);
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int row = start + k * kStep;
      if (row < view.rows) gathered[row * leading + slot] = allowed_or_infinite(cost[k]);
    }
  }
}

// A matched pair of a row and a column; numbered in the order of matching.
template <typename T>
struct Slot {
  T row_price;
  int32_t row;
};

// Arrays of one problem, in shared or global memory.
template <typename T>
struct Workspace {
  Slot<T>* slot;               // [rows]
  T *distance, *saved_price;   // [slots] of popped ones, and the price of popped or frozen ones
  T *key, *price;              // [slots] where they are not kept in registers
  T *best_cost, *lowest_cost;  // [rows] best free cost; cost of the best column of all
  int32_t *column_of_slot, *parent, *popped;
  int32_t* frozen;                 // [slots] 1 = in a tree that was closed
  int32_t *best_column, *waiting;  // [rows]
  int32_t* owner;                  // [columns] kFree, or the row that took it first

  __host__ __device__ static size_t bytes(int64_t rows, int64_t columns) {
    return rows * (sizeof(Slot<T>) + 6 * sizeof(T) + 6 * sizeof(int32_t)) + (columns + 1) / 2 * 2 * sizeof(int32_t);
  }

  __device__ Workspace(unsigned char* memory, int rows) {
    slot = reinterpret_cast<Slot<T>*>(memory);
    distance = reinterpret_cast<T*>(slot + rows);
    saved_price = distance + rows;
    key = saved_price + rows;
    price = key + rows;
    best_cost = price + rows;
    lowest_cost = best_cost + rows;
    column_of_slot = reinterpret_cast<int32_t*>(lowest_cost + rows);
    parent = column_of_slot + rows;
    popped = parent + rows;
    frozen = popped + rows;
    best_column = frozen + rows;
    waiting = best_column + rows;
    owner = waiting + rows;
  }
};

// One number for each slot of a thread: R registers, or an array in memory if R is 0.
template <typename E, int R>
struct PerSlot {
  E values[R];
  __device__ PerSlot(E*) {}
  __device__ __forceinline__ E& operator()(int turn, int) { return values[turn]; }
};

template <typename E>
struct PerSlot<E, 0> {
  E* values;
  __device__ PerSlot(E* memory) : values(memory) {}
  __device__ __forceinline__ E& operator()(int, int slot) { return values[slot]; }
};

// The searches of one problem, by a warp (R > 0: slots in registers) or a block. All threads follow the same path.
template <typename T, bool kStrided, typename Group, int R, bool kGathered>
class Search {
 public:
  // gathered [rows, leading]: costs of all rows at the slots' columns, if kGathered.
  __device__ Search(Group group, const CostView<T, kStrided>& view, const Workspace<T>& ws, T* gathered, int leading,
                    int slots)
      : group_(group),
        view_(view),
        ws_(ws),
        gathered_(gathered),
        leading_(leading),
        slots_(slots),
        key_(ws.key),
        price_(ws.price),
        parent_(ws.parent) {}

  // Matches the waiting rows, each by a search of its own; returns the number of slots.
  __device__ __forceinline__ int run(int waiting) {
    for_own(view_.rows, [&](int r, int slot) {
      price_(r, slot) = 0;
      parent_(r, slot) = kRoot;
      if (slot < view_.rows) ws_.frozen[slot] = 0;
    });
    for (int n = 0; n < waiting; ++n) search_from(ws_.waiting[n]);
    // Prices for the caller.
    for_own(slots_, [&](int r, int slot) {
      if (slot < slots_) ws_.price[slot] = ws_.frozen[slot] ? ws_.saved_price[slot] : price_(r, slot);
    });
    group_.sync();
    return slots_;
  }

 private:
  // body(turn, slot) for each slot of this thread below `count`, in registers for all.
  template <typename Body>
  __device__ __forceinline__ void for_own(int count, Body body) {
    if constexpr (R > 0) {
#pragma unroll
      for (int r = 0; r < R; ++r) body(r, r * Group::kSize + group_.rank);
    } else {
      for (int slot = group_.rank; slot < count; slot += Group::kSize) body(0, slot);
    }
  }

  __device__ __forceinline__ T cost_at(int row, int slot) const {
    if constexpr (kGathered) {
      return gathered_[row * leading_ + slot];
    } else {
      return view_.at(row, ws_.column_of_slot[slot]);
    }
  }

  // Relaxes all slots from a row at `distance`; returns the smallest key. Popped and frozen slots have price -infinity,
  // which keeps their keys.
  __device__ __forceinline__ T relax_from(int row, T price, T distance, int from) {
    const T base = distance - price;
    T least = kInfinity<T>;
    for_own(slots_, [&](int r, int slot) {
      const T cost = slot < slots_ ? cost_at(row, slot) : kInfinity<T>;
      const T path = maximum(base + (cost - price_(r, slot)), distance);
      if (path < key_(r, slot)) {
        key_(r, slot) = path;
        parent_(r, slot) = from;
      }
      least = minimum(key_(r, slot), least);
    });
    return smallest_nonnegative(group_, least);
  }

  __device__ __forceinline__ T smallest_key() {
    T least = kInfinity<T>;
    for_own(slots_, [&](int r, int slot) { least = minimum(key_(r, slot), least); });
    return smallest_nonnegative(group_, least);
  }

  // First slot with this key, and whether it was popped; one that was, which leads to a free column, wins.
  __device__ __forceinline__ int slot_with(T key, bool* is_popped) {
    constexpr uint32_t kUnpopped = 1u << 31;
    uint32_t first = ~0u;
    for_own(slots_, [&](int r, int slot) {
      const uint32_t code = (price_(r, slot) == -kInfinity<T> ? 0 : kUnpopped) + uint32_t(slot);
      if (key_(r, slot) == key && code < first) first = code;
    });
    first = group_.min(first);
    *is_popped = first < kUnpopped;
    return int(first & ~kUnpopped);
  }

  __device__ __forceinline__ void set_key(int slot, T key) {
    for_own(slots_, [&](int r, int own) {
      if (own == slot) key_(r, own) = key;
    });
  }

  // True if the row's best free column is still free; otherwise looks for the next best one.
  __device__ __forceinline__ bool best_is_free(int row) {
    const int column = ws_.best_column[row];
    if (column < 0 || ws_.owner[column] == kFree) return true;
    const Nearest<T> nearest = nearest_column<true>(group_, view_, row, ws_.owner);
    group_.sync();
    if (group_.rank == 0) {
      ws_.best_cost[row] = nearest.cost;
      ws_.best_column[row] = nearest.column;
    }
    group_.sync();
    return false;
  }

  // Distance through a row to its best free column. Rounding must not undercut what was popped before.
  __device__ __forceinline__ T exit_of(int row, T price, T distance) const {
    return maximum((distance - price) + ws_.best_cost[row], distance);
  }

  __device__ __forceinline__ void search_from(int root) {
    for_own(slots_, [&](int r, int slot) { key_(r, slot) = kInfinity<T>; });
    const T root_price = ws_.lowest_cost[root];
    T root_key = ws_.best_cost[root] - root_price, distance = 0, price = root_price;
    int row = root, from = kRoot;
    popped_ = 0;
    for (;;) {
      T least = relax_from(row, price, distance, from);
      int slot = kRoot;
      bool is_popped = false;
      for (;;) {
        if (root_key <= least && root_key < kInfinity<T>) {
          slot = kRoot;
          if (best_is_free(root)) break;
          root_key = ws_.best_cost[root] - root_price;
          continue;
        }
        if (!(least < kInfinity<T>)) return leave_one_out(root);
        slot = slot_with(least, &is_popped);
        const Slot<T> found = ws_.slot[slot];
        row = found.row;
        price = found.row_price;
        if (!is_popped || best_is_free(row)) break;
        group_.sync();  // another lane wrote the distance
        set_key(slot, exit_of(row, price, ws_.distance[slot]));
        least = smallest_key();
      }
      if (slot == kRoot) return augment(root, slot, root_key);
      if (is_popped) return augment(root, slot, least);
      distance = least;
      from = slot;
      pop(slot, distance, exit_of(row, price, distance));
    }
  }

  __device__ __forceinline__ void pop(int slot, T distance, T exit) {
    if (group_.rank == 0) ws_.popped[popped_] = slot;
    ++popped_;
    for_own(slots_, [&](int r, int own) {
      if (own != slot) return;
      ws_.distance[slot] = distance;
      ws_.saved_price[slot] = price_(r, own);
      price_(r, own) = -kInfinity<T>;
      key_(r, own) = exit;
    });
  }

  // Raises the prices of the tree's rows and lowers those of its columns until the path is tight.
  __device__ __forceinline__ void update_prices(T distance) {
    group_.sync();
    for (int n = group_.rank; n < popped_; n += Group::kSize) {
      const int slot = ws_.popped[n];
      const T slack = distance - ws_.distance[slot];
      ws_.slot[slot].row_price += slack;
      ws_.saved_price[slot] -= slack;
    }
    group_.sync();
  }

  __device__ __forceinline__ void publish_parents() {
    if constexpr (R > 0) {
      for_own(slots_, [&](int r, int slot) {
        if (slot < slots_) ws_.parent[slot] = parent_(r, slot);
      });
      group_.sync();
    }
  }

  // Every slot of the path takes over the row before it; the last one's own row has left it. By one thread.
  __device__ __forceinline__ void shift_rows(int root, T root_price, int slot) {
    while (slot != kRoot) {
      const int before = ws_.parent[slot];
      ws_.slot[slot] = before == kRoot ? Slot<T>{root_price, root} : ws_.slot[before];
      slot = before;
    }
  }

  __device__ __forceinline__ void augment(int root, int last, T distance) {
    update_prices(distance);
    for_own(slots_, [&](int r, int slot) {
      if (slot < slots_ && price_(r, slot) == -kInfinity<T> && !ws_.frozen[slot])
        price_(r, slot) = ws_.saved_price[slot];
    });
    publish_parents();
    if (group_.rank == 0) {
      const T root_price = ws_.lowest_cost[root] + distance;
      const Slot<T> end = last == kRoot ? Slot<T>{root_price, root} : ws_.slot[last];
      shift_rows(root, root_price, last);
      const int column = ws_.best_column[end.row];
      ws_.owner[column] = end.row;
      ws_.column_of_slot[slots_] = column;
      ws_.slot[slots_] = end;
    }
    group_.sync();
    add_slot();
  }

  __device__ __forceinline__ void add_slot() {
    for_own(slots_ + 1, [&](int r, int slot) {
      if (slot == slots_) price_(r, slot) = 0;
    });
    if constexpr (kGathered)
      gather_column<Group::kSize>(view_, ws_.column_of_slot[slots_], slots_, group_.rank, gathered_, leading_);
    ++slots_;
    group_.sync();
  }

  // No free column can be reached: the row of the tree whose absence costs least stays out, and the tree is closed. As
  // Solver::leave_one_out in cpu/assignment.h, in the same order.
  __device__ __forceinline__ void leave_one_out(int root) {
    group_.sync();
    const int tree = popped_;
    T least = -ws_.lowest_cost[root];
    int out = kRoot;
    for (int n = 0; n < tree; ++n) {
      const int slot = ws_.popped[n];
      const T exit = ws_.distance[slot] - ws_.slot[slot].row_price;
      if (exit < least || (exit == least && out != kRoot && slot < out)) least = exit, out = slot;
    }
    relax_frozen(root, ws_.lowest_cost[root], 0, kRoot);
    for (int n = 0; n < tree; ++n) {
      const int slot = ws_.popped[n];
      relax_frozen(ws_.slot[slot].row, ws_.slot[slot].row_price, ws_.distance[slot], slot);
    }
    for (;;) {
      T own = kInfinity<T>;
      for_own(slots_, [&](int r, int slot) {
        if (slot < slots_ && ws_.frozen[slot] && key_(r, slot) < least) own = minimum(key_(r, slot), own);
      });
      const T distance = from_ordered<T>(group_.min(ordered(own)));
      if (!(distance < kInfinity<T>)) break;
      uint32_t first = ~0u;
      for_own(slots_, [&](int r, int slot) {
        if (slot < slots_ && ws_.frozen[slot] && key_(r, slot) == distance && uint32_t(slot) < first) first = slot;
      });
      const int next = int(group_.min(first));
      for_own(slots_, [&](int r, int slot) {
        if (slot != next) return;
        ws_.distance[slot] = distance;
        ws_.frozen[slot] = 0;  // in the tree now
        key_(r, slot) = kInfinity<T>;
      });
      if (group_.rank == 0) ws_.popped[popped_] = next;
      ++popped_;
      const Slot<T> found = ws_.slot[next];
      const T exit = distance - found.row_price;
      if (exit < least) least = exit, out = next;
      relax_frozen(found.row, found.row_price, distance, next);
    }
    close_tree(root, out, least);
  }

  __device__ __forceinline__ void relax_frozen(int row, T price, T distance, int from) {
    for_own(slots_, [&](int r, int slot) {
      if (slot >= slots_ || !ws_.frozen[slot]) return;
      const T path = (distance - price) + (cost_at(row, slot) - ws_.saved_price[slot]);
      if (path < key_(r, slot)) {
        key_(r, slot) = path;
        parent_(r, slot) = from;
      }
    });
  }

  __device__ __forceinline__ void close_tree(int root, int out, T distance) {
    update_prices(distance);
    for (int n = group_.rank; n < popped_; n += Group::kSize) ws_.frozen[ws_.popped[n]] = 1;
    publish_parents();
    if (group_.rank == 0) shift_rows(root, ws_.lowest_cost[root] + distance, out);
    group_.sync();
  }

  Group group_;
  CostView<T, kStrided> view_;
  Workspace<T> ws_;
  T* gathered_;
  int leading_, slots_, popped_ = 0;
  PerSlot<T, R> key_, price_;
  PerSlot<int32_t, R> parent_;
};

// Image that comes `rank`-th when those with most targets come first. Large batches are taken as they are.
__device__ int ranked_image(const Batch& batch, int rank) {
  __shared__ int32_t count[kThreads];
  __shared__ int chosen;
  const int images = int(batch.images), own = int(threadIdx.x);
  if (images > kThreads) return rank;
  if (own < images) count[own] = batch.offsets[own + 1] - batch.offsets[own];
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
  __syncthreads();
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

// Row minima from what the cost kernel left for every 32 queries.
__device__ __forceinline__ void read_minima(const uint64_t* minima,  // [rows, segments]
                                            int segments, int rows, const Workspace<float>& ws) {
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    uint64_t least = ~uint64_t(0);
    for (int s = 0; s < segments; ++s) {
      const uint64_t x = minima[int64_t(i) * segments + s];
      least = x < least ? x : least;
    }
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
  const uint64_t* minima;  // [L, T, segments] packed cost and query, or null
  int segments;
  unsigned char* scratch;  // [L, B, scratch_bytes], for problems that do not fit shared memory
  size_t scratch_bytes, shared_bytes;
};

// One problem and where its results go.
template <typename T>
struct Problem {
  const T* cost;  // [targets, queries]
  int targets, queries;
  bool transposed;           // rows are queries
  int32_t* query_of_target;  // [targets]
  T *target_price, *query_price;

  __device__ Problem(const AssignmentArguments<T>& a, int layer, int image) {
    const Batch& batch = a.batch;
    const int32_t first = batch.offsets[image];
    const int64_t at = layer * batch.targets + first;
    targets = batch.offsets[image + 1] - first;
    queries = int(batch.queries);
    transposed = targets > queries;
    cost = a.cost + at * queries;
    query_of_target = a.query_of_target + at;
    target_price = a.target_price ? a.target_price + at : nullptr;
    query_price = a.query_price ? a.query_price + (layer * batch.images + image) * batch.queries : nullptr;
  }

  __device__ int rows() const { return transposed ? queries : targets; }
  __device__ int columns() const { return transposed ? targets : queries; }

  template <bool kStrided>
  __device__ CostView<T, kStrided> view() const {
    return {cost, rows(), columns(), transposed ? 1 : queries, transposed ? queries : 1};
  }

  // By the threads rank, rank + size, ...; the arrays are -1 and 0 before.
  __device__ __forceinline__ void write(const Workspace<T>& ws, int slots, int rank, int size) const {
    T* row_price = transposed ? query_price : target_price;
    T* column_price = transposed ? target_price : query_price;
    for (int k = rank; k < slots; k += size) {
      const Slot<T> slot = ws.slot[k];
      const int column = ws.column_of_slot[k];
      query_of_target[transposed ? column : slot.row] = transposed ? slot.row : column;
      if (row_price) row_price[slot.row] = slot.row_price;
      if (column_price) column_price[column] = ws.price[k];
    }
  }
};

// Up to 256 rows: a warp searches, slots in registers.
template <int kMostRows>
__device__ __forceinline__ void solve_by_warp(const AssignLaunch<float>& launch, const Problem<float>& problem,
                                              int64_t first_row, size_t workspace_bytes) {
  const auto view = problem.view<false>();
  const Workspace<float> ws(dynamic_shared, view.rows);
  if (launch.minima) {
    read_minima(launch.minima + first_row * launch.segments, launch.segments, view.rows, ws);
  } else {
    find_minima(view, ws);
  }
  __syncthreads();
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
  __syncthreads();
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
  const unsigned layers = unsigned(batch.layers), layer = blockIdx.x % layers;
  const int image = ranked_image(batch, int(blockIdx.x / layers));
  const Problem<T> problem(a, int(layer), image);
  for (int t = threadIdx.x; t < problem.targets; t += kThreads) problem.query_of_target[t] = -1;
  if (image + 1 == batch.images)  // rows past the last offset
    for (int64_t t = batch.offsets[batch.images] + int(threadIdx.x); t < batch.targets; t += kThreads)
      a.query_of_target[layer * batch.targets + t] = -1;
  if (problem.rows() == 0) return;

  const int64_t first_row = layer * batch.targets + batch.offsets[image];
  const size_t bytes = Workspace<T>::bytes(problem.rows(), problem.columns());
  const bool in_shared = bytes <= launch.shared_bytes;
  // Images with more targets than max_count are left unmatched: there is no room for them.
  if constexpr (kMostRows != kAnyRows) {
    if (problem.transposed || bytes + gathered_bytes(problem.rows()) > launch.shared_bytes) return;
    if (problem.rows() <= kMostRows) solve_by_warp<kMostRows>(launch, problem, first_row, bytes);
  } else {
    if (!in_shared && bytes > launch.scratch_bytes) return;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (in_shared && !problem.transposed && problem.rows() <= kRegisterRows)
        return solve_by_warp<kMostRows>(launch, problem, first_row, bytes);
    }
    const int64_t number = layer * batch.images + image;
    solve_by_block(problem, in_shared ? dynamic_shared : launch.scratch + number * launch.scratch_bytes);
  }
}

template <typename T>
AssignLaunch<T> launch_of(const AssignmentArguments<T>& a, const uint64_t* minima, const AssignPlan& plan,
                          void* scratch) {
  const int segments = minima_segments(a.batch.queries);
  return {a, minima, segments, static_cast<unsigned char*>(scratch), plan.scratch_bytes, plan.shared_bytes};
}

}  // namespace

AssignPlan assign_plan(const Batch& batch, int64_t max_count, ElementType type) {
  const int64_t rows = std::min(max_count, batch.queries), columns = std::max(max_count, batch.queries);
  const size_t limit = shared_memory_limit("assign");
  if (type == ElementType::kFloat64) {
    const size_t bytes = Workspace<double>::bytes(rows, columns);
    return {kAnyRows, std::min(bytes, limit), bytes <= limit ? 0 : (bytes + 15) / 16 * 16};
  }
  const int64_t small = std::min<int64_t>(rows, kRegisterRows);
  const size_t searched_by_warp = Workspace<float>::bytes(small, columns) + gathered_bytes(small);
  if (max_count <= batch.queries && rows <= kRegisterRows && searched_by_warp <= limit)
    return {rows <= 64 ? 64 : kRegisterRows, searched_by_warp, 0};
  const size_t bytes = Workspace<float>::bytes(rows, columns);
  return {kAnyRows, std::min(std::max(bytes, searched_by_warp), limit), bytes <= limit ? 0 : (bytes + 15) / 16 * 16};
}

void assign(const AssignmentArguments<float>& a, const uint64_t* minima, const AssignPlan& plan, void* scratch,
            void* stream) {
  const auto start = [&](auto kernel) {
    launch("assign", kernel, a.batch.layers * a.batch.images, kThreads, plan.shared_bytes, stream,
           launch_of(a, minima, plan, scratch));
  };
  if (plan.most_rows == 64) return start(assign_kernel<float, 64>);
  if (plan.most_rows == kRegisterRows) return start(assign_kernel<float, kRegisterRows>);
  start(assign_kernel<float, kAnyRows>);
}

void assign(const AssignmentArguments<double>& a, const AssignPlan& plan, void* scratch, void* stream) {
  launch("assign", assign_kernel<double, kAnyRows>, a.batch.layers * a.batch.images, kThreads, plan.shared_bytes,
         stream, launch_of<double>(a, nullptr, plan, scratch));
}

}  // namespace detr::cuda
