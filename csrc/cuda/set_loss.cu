// Set loss of all layers with its gradients: the formulas of cpu/set_loss.h.
//
// A block takes 64 queries of one image in one layer. It sums the layer's class weights itself (a pass over the
// targets, the same in every block), looks up which target each query has, then teams of 16 lanes take a query's
// logits and single threads its box. Sums go to the scratch in double, and the last block to finish adds them up in a
// fixed order. Memory: logits once from L2 or beyond, gradients once.
#include <cmath>

#include "../core/class_cost.h"
#include "../kernels.h"
#include "elements.h"
#include "group.h"
#include "launch.h"
#include "softmax_row.h"

namespace detr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTile = 64;  // queries of a block
constexpr int kTeams = kThreads / kTeam;
static_assert(kTile % kTeams == 0);

// What one block adds to the losses before normalisation, and the normaliser of its layer's class loss.
struct Partial {
  double class_loss, box_loss, giou_loss, correct, matched, objects_predicted;
  double class_normaliser;
};

__host__ __device__ constexpr int64_t tiles_of(int64_t queries) { return (queries + kTile - 1) / kTile; }

template <typename T>
struct LossLaunch {
  LossArguments<T> arguments;
  Partial* partials;  // [L, B, tiles]
  unsigned* arrived;  // blocks that have written theirs; 0 before
};

// The same sum in every thread, in a fixed order.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// By all threads of the block; `parts` [kWarps] is shared memory that nobody reads any more.
__device__ __forceinline__ double block_sum(double x, double* parts) {
  const double own = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = own;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  __syncthreads();
  return sum;
}

template <typename T>
__device__ __forceinline__ double box_normaliser(const LossArguments<T>& a) {
  const float count = a.num_boxes ? *a.num_boxes : float(a.batch.offsets[a.batch.images]);
  return count < 1 ? 1.0 : double(count);  // NaN stays
}

// Sum of the class weights of all queries of a layer (softmax), or the number of boxes.
template <typename T>
__device__ double class_normaliser(const LossArguments<T>& a, int layer, double* parts) {
  if (a.kind != ClassKind::kSoftmax) return box_normaliser(a);
  const Batch& batch = a.batch;
  const int64_t last = a.classes - 1;
  const auto weight_of = [&](int64_t c) { return a.class_weight ? double(a.class_weight[c]) : 1.0; };
  double weights = 0, matched = 0;
  for (int64_t t = threadIdx.x; t < batch.offsets[batch.images]; t += kThreads) {
    const int32_t query = a.query_of_target[layer * batch.targets + t];
    if (query < 0 || query >= batch.queries) continue;
    const int64_t label = a.labels[t];
    weights += label >= 0 && label < last ? weight_of(label) : std::numeric_limits<double>::quiet_NaN();
    matched += 1;
  }
  weights = block_sum(weights, parts);
  matched = block_sum(matched, parts);
  return weights + (double(batch.images * batch.queries) - matched) * weight_of(last);
}

// Where this thread's team is, and the logits of its query.
template <typename T, typename E>
struct Row {
  Reader<T, E> logit;
  int64_t begin;
  int classes, lane;

  __device__ __forceinline__ T operator()(int c) const { return logit(begin + c); }
};

// The last logit of a row and the largest of the others.
template <typename T>
struct RowPeaks {
  T others, last;
};

template <typename T, typename E>
__device__ __forceinline__ RowPeaks<T> peaks_of(const Row<T, E>& row) {
  T others = -kInfinity<T>;
#pragma unroll 4
  for (int c = row.lane; c < row.classes - 1; c += kTeam) others = larger(row(c), others);
  return {team_largest(others), row(row.classes - 1)};
}

// The largest logit is the label's, where the first of equal ones counts. By the whole warp.
template <typename T, typename E>
__device__ __forceinline__ bool is_correct(const Row<T, E>& row, int64_t label) {
  bool beaten = label < 0 || label >= row.classes;
  const T own = row(beaten ? 0 : int(label));
  for (int c = row.lane; c < row.classes; c += kTeam) {
    const T x = row(c);
    beaten |= x > own || (x == own && c < label);
  }
  const unsigned team = 0xffffu << (threadIdx.x % kWarpSize / kTeam * kTeam);
  return (__ballot_sync(kAllLanes, beaten) & team) == 0;
}

// Weighted cross-entropy of a team's query; `gradient` [classes] is written if the team has a query.
template <typename T, typename E>
__device__ __forceinline__ double cross_entropy(const LossArguments<T>& a, const Row<T, E>& row, T largest,
                                                int64_t label, T scale, T* gradient) {
  T sum = 0;
#pragma unroll 2
  for (int c = row.lane; c < row.classes; c += kTeam) sum += Math<T>::exp(row(c) - largest);
  sum = team_sum(sum);
  const bool is_known = label >= 0 && label < row.classes;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const T own_weight = !is_known ? nan : a.class_weight ? T(a.class_weight[label]) : T(1);
  const T weight = own_weight * scale, by_probability = weight / sum;
  if (gradient) {
#pragma unroll 2
    for (int c = row.lane; c < row.classes; c += kTeam) {
      const T slope = Math<T>::exp(row(c) - largest) * by_probability;
      gradient[c] = c == label ? slope - weight : slope;
    }
  }
  const T at_label = is_known ? row(int(label)) : nan;
  return double(own_weight) * (double(log(sum)) + double(largest) - double(at_label));
}

// Sigmoid focal loss of a team's query; label -1: all classes are negative.
template <typename T, typename E>
__device__ __forceinline__ double focal(const LossArguments<T>& a, const Row<T, E>& row, int64_t label, T scale,
                                        T* gradient) {
  T sum = 0;
  for (int c = row.lane; c < row.classes; c += kTeam) {
    const Sigmoid<T> s = sigmoid_of<Math<T>>(row(c));
    const FocalTerm<T> term = c == label ? focal_loss_positive<Math<T>>(s, a.alpha, a.gamma)
                                         : focal_loss_negative<Math<T>>(s, a.alpha, a.gamma);
    sum += term.loss;
    if (gradient) gradient[c] = term.gradient * scale;
  }
  const double loss = double(team_sum(sum));
  return label < row.classes ? loss : std::numeric_limits<double>::quiet_NaN();
}

// L1 and GIoU of one query's box, with their gradients; zero without a target.
template <typename T>
__device__ __forceinline__ void box_losses(const LossArguments<T>& a, int64_t query, int64_t target, T scale,
                                           Partial& sums) {
  T* gradient = a.boxes_gradient + 8 * query;
  if (target < 0) {
    for (int k = 0; k < 8; ++k) gradient[k] = 0;
    return;
  }
  const CentreBox<T> box = read_box<T>(a.boxes, query), goal = target_box<T>(a.target_boxes, target);
  const Corners<T> corners = corners_of(box), goal_corners = corners_of(goal);
  const Overlap<T> overlap = overlap_of(corners, goal_corners);
  const bool valid = !(smaller(smaller(box.w, box.h), smaller(goal.w, goal.h)) < 0);
  sums.matched += 1;
  sums.box_loss += double(l1_distance(box, goal));
  sums.giou_loss += double(1 - (valid ? giou_of(overlap) : std::numeric_limits<T>::quiet_NaN()));
  const CentreBox<T> giou = giou_loss_gradient(corners, goal_corners, overlap);
  const T parts[8] = {sign(box.cx - goal.cx),
                      sign(box.cy - goal.cy),
                      sign(box.w - goal.w),
                      sign(box.h - goal.h),
                      giou.cx,
                      giou.cy,
                      giou.w,
                      giou.h};
  for (int k = 0; k < 8; ++k) gradient[k] = parts[k] * scale;
}

// Class loss and error of the block's queries, four for each team.
template <typename T, typename E>
__device__ __forceinline__ void class_losses(const LossArguments<T>& a, int64_t first_query, int count,
                                             const int* target_of_query, T scale, Partial& sums) {
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
  for (int start = 0; start < count; start += kTeams) {
    const int query = start + team;
    const bool is_query = query < count;  // teams without one follow along with the last one's
    const int64_t at = first_query + (is_query ? query : count - 1);
    const Row<T, E> row = {Reader<T, E>(a.logits), at * a.classes, int(a.classes), lane};
    const int target = is_query ? target_of_query[query] : -1;
    const RowPeaks<T> peaks = peaks_of(row);
    const int64_t label = target >= 0 ? a.labels[target] : -1;
    const bool correct = is_correct(row, label);
    T* gradient = is_query ? a.logits_gradient + at * a.classes : nullptr;
    double loss;
    if (a.kind == ClassKind::kSoftmax) {
      const int64_t last = a.classes - 1;
      const int64_t wanted = target < 0 ? last : label < last ? label : -1;  // a target's label is never "no object"
      loss = cross_entropy(a, row, larger(peaks.last, peaks.others), wanted, scale, gradient);
    } else {
      loss = focal(a, row, target < 0 ? -1 : label >= 0 ? label : a.classes, scale, gradient);
    }
    if (lane != 0 || !is_query) continue;
    sums.class_loss += loss;
    sums.objects_predicted += peaks.others >= peaks.last;
    sums.correct += target >= 0 && correct;
  }
}

// Adds up one layer's images by a warp: losses, in the order of kTerms.
template <typename T>
__device__ __forceinline__ void reduce_layer(const LossArguments<T>& a, const Partial* partials, int layer, T* losses) {
  const Batch& batch = a.batch;
  const int tiles = int(tiles_of(batch.queries)), lane = threadIdx.x % kWarpSize;
  const Partial* own = partials + int64_t(layer) * batch.images * tiles;
  Partial sums = {};
  double cardinality = 0;
  for (int b = lane; b < batch.images; b += kWarpSize) {
    double objects_predicted = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const Partial& part = own[int64_t(b) * tiles + tile];
      sums.class_loss += part.class_loss;
      sums.box_loss += part.box_loss;
      sums.giou_loss += part.giou_loss;
      sums.correct += part.correct;
      sums.matched += part.matched;
      objects_predicted += part.objects_predicted;
    }
    cardinality += fabs(objects_predicted - double(batch.offsets[b + 1] - batch.offsets[b]));
  }
  sums.class_loss = warp_sum(sums.class_loss);
  sums.box_loss = warp_sum(sums.box_loss);
  sums.giou_loss = warp_sum(sums.giou_loss);
  sums.correct = warp_sum(sums.correct);
  sums.matched = warp_sum(sums.matched);
  cardinality = warp_sum(cardinality);
  if (lane != 0) return;
  const double class_scale = double(T(1 / own->class_normaliser)), box_scale = double(T(1 / box_normaliser(a)));
  losses[0] = T(sums.class_loss * class_scale);
  losses[1] = T(sums.box_loss * box_scale);
  losses[2] = T(sums.giou_loss * box_scale);
  losses[3] = T(cardinality / double(batch.images));
  losses[4] = T(sums.matched > 0 ? 100 - 100 * sums.correct / sums.matched : 100);
}

// By the last block.
template <typename T>
__device__ __forceinline__ void reduce_losses(const LossLaunch<T>& launch) {
  const LossArguments<T>& a = launch.arguments;
  const int layers = int(a.batch.layers);
  for (int layer = threadIdx.x / kWarpSize; layer < layers; layer += kWarps)
    reduce_layer(a, launch.partials, layer, a.losses + layer * kTerms);
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  for (int k = 0; a.loss_weight && k < layers * kTerms; ++k)
    if (a.loss_weight[k] != 0) total += double(a.losses[k]) * double(a.loss_weight[k]);
  *a.total = T(total);
}

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(double) ? 1 : 4)
    set_loss_kernel(const LossLaunch<T> launch) {
  __shared__ int target_of_query[kTile];
  __shared__ double parts[kWarps];
  __shared__ bool is_last;
  const LossArguments<T>& a = launch.arguments;
  const Batch& batch = a.batch;
  const int queries = int(batch.queries);
  const unsigned tiles = unsigned(tiles_of(queries)), number = blockIdx.x / tiles;
  const int start = int(blockIdx.x % tiles) * kTile, count = smaller(kTile, queries - start);
  const int layer = int(number / unsigned(batch.images)), image = int(number % unsigned(batch.images));
  const int64_t first_query = int64_t(number) * queries + start;

  if (threadIdx.x < kTile) target_of_query[threadIdx.x] = -1;
  Partial sums = {};
  sums.class_normaliser = class_normaliser(a, layer, parts);
  __syncthreads();
  const int first_target = batch.offsets[image], end_target = batch.offsets[image + 1];
  for (int t = first_target + int(threadIdx.x); t < end_target; t += kThreads) {
    const int query = a.query_of_target[layer * batch.targets + t] - start;
    if (query >= 0 && query < count) atomicMax(&target_of_query[query], t);
  }
  __syncthreads();

  class_losses<T, E>(a, first_query, count, target_of_query, T(1 / sums.class_normaliser), sums);
  if (int(threadIdx.x) < count)
    box_losses(a, first_query + threadIdx.x, target_of_query[threadIdx.x], T(1 / box_normaliser(a)), sums);

  sums.class_loss = block_sum(sums.class_loss, parts);
  sums.box_loss = block_sum(sums.box_loss, parts);
  sums.giou_loss = block_sum(sums.giou_loss, parts);
  sums.correct = block_sum(sums.correct, parts);
  sums.matched = block_sum(sums.matched, parts);
  sums.objects_predicted = block_sum(sums.objects_predicted, parts);
  if (threadIdx.x == 0) {
    launch.partials[blockIdx.x] = sums;
    __threadfence();
    const unsigned blocks = unsigned(batch.layers * batch.images) * tiles;
    is_last = atomicAdd(launch.arrived, 1u) == blocks - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  reduce_losses(launch);
}

template <typename T>
void enqueue(const LossArguments<T>& a, void* scratch, void* stream) {
  const int64_t blocks = a.batch.layers * a.batch.images * tiles_of(a.batch.queries);
  auto* partials = static_cast<Partial*>(scratch);
  auto* arrived = reinterpret_cast<unsigned*>(partials + blocks);
  check(cudaMemsetAsync(arrived, 0, sizeof *arrived, static_cast<cudaStream_t>(stream)), "set_loss");
  const LossLaunch<T> arguments = {a, partials, arrived};
  const auto start = [&](auto kernel) { launch("set_loss", kernel, blocks, kThreads, 0, stream, arguments); };
  if constexpr (sizeof(T) == sizeof(double)) {
    start(set_loss_kernel<T, void>);
  } else {
    with_element_type(a.logits.type, [&](auto tag) {
      // float64 logits are computed in double.
      if constexpr (sizeof tag != sizeof(double)) start(set_loss_kernel<T, decltype(tag)>);
    });
  }
}

}  // namespace

size_t set_loss_scratch_bytes(const Batch& batch) {
  return batch.layers * batch.images * tiles_of(batch.queries) * sizeof(Partial) + sizeof(unsigned);
}

void set_loss(const LossArguments<float>& a, void* scratch, void* stream) { enqueue(a, scratch, stream); }
void set_loss(const LossArguments<double>& a, void* scratch, void* stream) { enqueue(a, scratch, stream); }

}  // namespace detr::cuda
