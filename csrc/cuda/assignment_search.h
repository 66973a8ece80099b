// Shortest augmenting paths on compact slots by a group of threads: Solver of cpu/assignment.h, step by step, so the
// same prices and the same assignment, bit for bit.
#pragma once

#include "assignment_costs.h"

namespace detr::cuda {

constexpr int kRoot = -1;

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

}  // namespace detr::cuda
