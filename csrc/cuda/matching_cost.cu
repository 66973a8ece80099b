// Matching cost of every target with the queries of its own image: the arithmetic of cpu/matching_cost.h in the same
// order, so the same bits in float.
//
// A block takes 64 queries of one group of an image in one layer. For softmax, teams of 16 lanes read a query's logits
// once, into shared memory where they fit (383 classes), and find maximum and sum; for focal only the targets' labels
// are read. Then each warp takes 32 queries and every fourth target: rows of the cost are written whole, and their
// minima are left for the assignment.
#include "../core/class_cost.h"
#include "../kernels.h"
#include "elements.h"
#include "group.h"
#include "launch.h"
#include "segments.h"
#include "softmax_row.h"

namespace detr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;  // queries of a block
constexpr int kTeams = kThreads / kTeam;
constexpr int kTargetWarps = kThreads / kTile;  // warps that share the same queries
constexpr size_t kMostRowBytes = 96 * 1024;     // of logits in shared memory, on every architecture
static_assert(kTile % kTeams == 0 && kTile == 2 * kWarpSize);

template <typename T>
struct CostLaunch {
  CostArguments<T> arguments;
  T* cost;           // [L, T, Q]
  uint64_t* minima;  // [L, T, G, segments], or null; float only
  int segments;
  int64_t* status;  // [2], or null
  int row_stride;   // of a query's logits in shared memory, 0 if they stay in global memory
};

// Maximum of a query's logits and -weight / sum of exp(logit - maximum).
template <typename T>
struct Softmax {
  T largest, scale;
};

// Softmax statistics of a block's queries; keeps the logits in `rows` [kTile, row_stride] where they fit.
template <typename T, typename E>
__device__ __forceinline__ void read_rows(const CostLaunch<T>& launch, int64_t first_query, int count, T* rows,
                                          Softmax<T>* softmax) {
  const CostArguments<T>& a = launch.arguments;
  const Reader<T, E> logit(a.logits);
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam, classes = int(a.classes);
  for (int start = 0; start < kTile; start += kTeams) {
    const int query = start + team;
    // Teams without a query follow along with the last one's: all lanes of a warp take part in shuffles.
    const int64_t row = (first_query + smaller(query, count - 1)) * classes;
    T* own = rows + query * launch.row_stride;
    T largest = -kInfinity<T>;
#pragma unroll 4
    for (int c = lane; c < classes; c += kTeam) {
      const T x = logit(row + c);
      if (launch.row_stride) own[c] = x;
      largest = larger(x, largest);
    }
    largest = team_largest(largest);
    T sum = 0;
#pragma unroll 2
    for (int c = lane; c < classes; c += kTeam)
      sum += Math<T>::exp((launch.row_stride ? own[c] : logit(row + c)) - largest);
    sum = team_sum(sum);
    if (lane == 0) softmax[query] = {largest, -a.class_weight / sum};
  }
}

// A pair's cost and the terms that it is made of.
template <typename T>
struct Pair {
  T class_cost, box_cost, giou_cost, total;
};

// Forbidden pairs met by a thread, as Forbidden in kernels.h.
struct Faults {
  unsigned count = 0;
  long long first = 0;  // INT64_MAX - the packed position: larger is earlier
};

template <typename T>
__device__ __forceinline__ void note_fault(const Pair<T>& pair, bool label_is_known, int64_t position, Faults& faults) {
  const auto at_fault = [](T x) { return !(fabs(x) < kCostLimit<T>); };
  int64_t terms = 0;
  if (!label_is_known)
    terms |= kLabelTerm;
  else if (at_fault(pair.class_cost))
    terms |= kClassTerm;
  if (at_fault(pair.box_cost)) terms |= kBoxTerm;
  if (at_fault(pair.giou_cost)) terms |= kGiouTerm;
  if (terms == 0) terms = kSumTerm;
  const long long order = INT64_MAX - (position << kTermBits | terms);
  ++faults.count;
  if (order > faults.first) faults.first = order;
}

__device__ __forceinline__ void add_to_status(const Faults& faults, int64_t* status) {
  if (!__any_sync(kAllLanes, faults.count > 0)) return;
  const unsigned count = __reduce_add_sync(kAllLanes, faults.count);
  long long first = faults.first;
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const long long other = __shfl_xor_sync(kAllLanes, first, distance);
    first = other > first ? other : first;
  }
  if (threadIdx.x % kWarpSize != 0) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(status), static_cast<unsigned long long>(count));
  atomicMax(reinterpret_cast<long long*>(status) + 1, first);
}

template <typename T>
__device__ __forceinline__ Pair<T> cost_of_pair(const CostArguments<T>& a, T class_cost, const CentreBox<T>& box,
                                                const CentreBox<T>& goal) {
  const T box_cost = a.box_weight * l1_distance(box, goal);
  const T giou_cost = a.giou_weight * giou_or_nan(box, goal, a.guard);
  return {class_cost, box_cost, giou_cost, (box_cost + class_cost) - giou_cost};
}

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads) matching_cost_kernel(const CostLaunch<T> launch) {
  __shared__ Softmax<T> softmax[kTile];
  T* rows = reinterpret_cast<T*>(dynamic_shared);  // [kTile, row_stride]
  const CostArguments<T>& a = launch.arguments;
  const Batch& batch = a.batch;
  const int queries = int(batch.queries), classes = int(a.classes);
  const int groups = int(a.groups), width = queries / groups;
  const unsigned tiles = unsigned(width + kTile - 1) / kTile, number = blockIdx.x / tiles / unsigned(groups);
  const int group = int(blockIdx.x / tiles % unsigned(groups)), start_in_group = int(blockIdx.x % tiles) * kTile;
  const int start = group * width + start_in_group, count = smaller(kTile, width - start_in_group);
  const int layer = int(number / unsigned(batch.images)), image = int(number % unsigned(batch.images));
  const Segment segment = segment_of(batch, image);
  const int first_target = segment.begin, targets = segment.end - segment.begin;
  const int64_t first_query = int64_t(number) * queries + start, first_row = layer * batch.targets + first_target;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int own = warp % 2 * kWarpSize + lane, query = start + own;  // of this thread
  const bool is_query = own < count;

  if (!launch.minima && image + 1 == batch.images && is_query)  // rows past the last offset
    for (int64_t t = end_of_targets(batch) + warp / 2; t < batch.targets; t += kTargetWarps)
      launch.cost[(layer * batch.targets + t) * queries + query] = 0;
  if (targets == 0) return;

  if (a.kind == ClassKind::kSoftmax) {
    read_rows<T, E>(launch, first_query, count, rows, softmax);
    __syncthreads();
  }
  const int within = is_query ? own : count - 1;  // threads without a query compute the last one's
  const Reader<T, E> logit(a.logits);
  const CentreBox<T> box = read_box<T>(a.boxes, first_query + within);
  const int64_t label_end = label_limit(a.kind, classes);
  Faults faults;
  for (int t = warp / 2; t < targets; t += kTargetWarps) {
    const int64_t label = __ldg(a.labels + first_target + t);
    const bool label_is_known = label >= 0 && label < label_end;
    T class_cost = std::numeric_limits<T>::quiet_NaN();
    if (label_is_known) {
      const T x = launch.row_stride ? rows[within * launch.row_stride + label]
                                    : logit((first_query + within) * classes + label);
      if (a.kind == ClassKind::kSoftmax) {
        class_cost = Math<T>::exp(x - softmax[within].largest) * softmax[within].scale;
      } else {
        class_cost = a.class_weight *
                     focal_cost<Math<T>>(x, a.alpha, a.gamma, a.kind == ClassKind::kFocalStable, a.class_epsilon);
      }
    }
    const Pair<T> pair = cost_of_pair(a, class_cost, box, target_box<T>(a.target_boxes, first_target + t));
    const bool allowed = fabs(pair.total) < kCostLimit<T>;
    if (is_query) launch.cost[(first_row + t) * queries + query] = pair.total;
    if (is_query && !allowed && launch.status) {
      const int last = (1 << kTargetBits) - 1;  // targets beyond are reported as this one
      const int64_t position =
          ((int64_t(layer) << kImageBits | image) << kTargetBits | smaller(t, last)) << kQueryBits | query;
      note_fault(pair, label_is_known, position, faults);
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (launch.minima) {
        const uint32_t key = ordered(allowed && is_query ? pair.total : kInfinity<float>);
        const uint32_t least = __reduce_min_sync(kAllLanes, key);
        const int first = __ffs(int(__ballot_sync(kAllLanes, key == least))) - 1;
        const int part = start_in_group / kWarpSize + warp % 2;
        if (lane == 0 && part < launch.segments)
          launch.minima[((first_row + t) * groups + group) * launch.segments + part] =
              uint64_t(least) << 32 | unsigned(part * kWarpSize + first);
      }
    }
  }
  if (launch.status) add_to_status(faults, launch.status);
}

template <typename T>
void enqueue(const CostArguments<T>& a, T* cost, uint64_t* minima, int64_t* status, void* stream) {
  const int64_t width = a.batch.queries / a.groups, tiles = (width + kTile - 1) / kTile;
  const size_t row_bytes = (a.classes | 1) * sizeof(T);  // odd: no two queries of a warp meet in a bank
  const bool in_shared = a.kind == ClassKind::kSoftmax && kTile * row_bytes <= kMostRowBytes;
  const CostLaunch<T> arguments = {
      a, cost, minima, static_cast<int>(minima_segments(width)), status, in_shared ? int(a.classes | 1) : 0};
  const auto start = [&](auto kernel) {
    launch("matching_cost", kernel, a.batch.layers * a.batch.images * a.groups * tiles, kThreads,
           in_shared ? kTile * row_bytes : 0, stream, arguments);
  };
  if constexpr (sizeof(T) == sizeof(double)) {
    start(matching_cost_kernel<T, void>);
  } else {
    with_element_type(a.logits.type, [&](auto tag) {
      // float64 logits are computed in double.
      if constexpr (sizeof tag != sizeof(double)) start(matching_cost_kernel<T, decltype(tag)>);
    });
  }
}

}  // namespace

void matching_cost(const CostArguments<float>& a, float* cost, uint64_t* minima, int64_t* status, void* stream) {
  enqueue(a, cost, minima, status, stream);
}

void matching_cost(const CostArguments<double>& a, double* cost, uint64_t* minima, int64_t* status, void* stream) {
  enqueue(a, cost, minima, status, stream);
}

}  // namespace detr::cuda
