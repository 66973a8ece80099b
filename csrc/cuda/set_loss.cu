// Set loss of all layers with its gradients: the formulas of cpu/set_loss.h.
//
// A block takes up to 64 queries of one image in one layer. It sums the layer's class weights itself (a pass over the
// targets, the same in every block), looks up which target each query has, then single threads take a query's box and
// teams of 16 lanes its logits. Sums go to the scratch in double, and the last block to finish adds them up in a fixed
// order. Memory: logits from L2 or beyond, gradients written once.
#include <cmath>

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
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMostTile = 64;  // queries of a block
constexpr int kTeams = kThreads / kTeam;
static_assert(kMostTile % kTeams == 0);

// What one block adds to the losses before normalisation, and the normaliser of its layer's class loss.
struct Partial {
  double class_loss, box_loss, giou_loss, class_normaliser;
  unsigned correct, matched, objects_predicted;
};

// What one thread adds.
struct ThreadSums {
  double class_loss = 0, box_loss = 0, giou_loss = 0;
  unsigned correct = 0, matched = 0, objects_predicted = 0;
};

// Queries of a block: fewer where the device would otherwise idle.
int tile_of(const Batch& batch) {
  const int64_t blocks = batch.layers * batch.images * ((batch.queries + kMostTile - 1) / kMostTile);
  return blocks < 256 ? kTeams : kMostTile;
}

int64_t tiles_of(const Batch& batch) { return (batch.queries + tile_of(batch) - 1) / tile_of(batch); }

template <typename T>
struct LossLaunch {
  LossArguments<T> arguments;
  int tile, tiles;    // queries of a block, blocks of a problem
  Partial* partials;  // [L, B, tiles]
  unsigned* arrived;  // blocks that have written theirs; 0 before
};

// The same sum in every thread, in a fixed order.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Shared memory of a block for its sums, one place a warp.
struct WarpParts {
  double class_loss[kWarps], box_loss[kWarps], giou_loss[kWarps];
  unsigned correct[kWarps], matched[kWarps], objects_predicted[kWarps];
};

template <typename T>
__device__ __forceinline__ double box_normaliser(const LossArguments<T>& a) {
  const float count = a.num_boxes ? *a.num_boxes : float(a.batch.offsets[a.batch.images]);
  return count < 1 ? 1.0 : double(count);  // NaN stays
}

// Sum of the class weights of all queries of a layer (softmax), or the number of boxes. By the whole block, which waits
// before it uses `parts` again.
template <typename T>
__device__ __forceinline__ double class_normaliser(const LossArguments<T>& a, int layer, WarpParts& parts) {
  if (!is_softmax(a.kind)) return box_normaliser(a);
  const Batch& batch = a.batch;
  const int64_t last = a.classes - 1;
  const auto weight_of = [&](int64_t c) { return a.class_weight ? double(a.class_weight[c]) : 1.0; };
  double weights = 0;
  unsigned matched = 0;
  for (int64_t t = threadIdx.x; t < end_of_targets(batch); t += kThreads) {
    const int32_t query = a.query_of_target[layer * batch.targets + t];
    if (query < 0 || query >= batch.queries) continue;
    const int64_t label = a.labels[t];
    weights += label >= 0 && label < last ? weight_of(label) : std::numeric_limits<double>::quiet_NaN();
    ++matched;
  }
  weights = warp_sum(weights);
  matched = __reduce_add_sync(kAllLanes, matched);
  if (threadIdx.x % kWarpSize == 0) {
    parts.class_loss[threadIdx.x / kWarpSize] = weights;
    parts.matched[threadIdx.x / kWarpSize] = matched;
  }
  __syncthreads();
  weights = 0;
  matched = 0;
  for (int w = 0; w < kWarps; ++w) {
    weights += parts.class_loss[w];
    matched += parts.matched[w];
  }
  return weights + (double(batch.images * batch.queries) - double(matched)) * weight_of(last);
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

// The largest logit is the label's, where the first of equal ones counts, and NaN is above all: argmax. By the whole
// warp; label -1 is never right.
template <typename T, typename E>
__device__ __forceinline__ bool is_correct(const Row<T, E>& row, int64_t label) {
  bool beaten = label < 0 || label >= row.classes;
  const T own = row(beaten ? 0 : int(label));
  const bool own_is_nan = own != own;
  for (int c = beaten ? row.classes : row.lane; c < row.classes; c += kTeam) {
    const T x = row(c);
    const bool equal = x == own || (x != x && own_is_nan);
    beaten |= x > own || (x != x && !own_is_nan) || (equal && c < label);
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

// Sum of the sigmoid losses of a team's query; label -1: all classes are negative.
template <typename T, typename E>
__device__ __forceinline__ double sigmoid_losses(const LossArguments<T>& a, const Row<T, E>& row, int64_t label, T iou,
                                                 T scale, T* gradient) {
  const NegativeWeight<T> weight = negative_weight(a.kind, a.alpha, a.gamma);
  T sum = 0;
  for (int c = row.lane; c < row.classes; c += kTeam) {
    const Sigmoid<T> s = sigmoid_of<Math<T>>(row(c));
    const ClassTerm<T> term =
        c == label ? positive_example<Math<T>>(a.kind, s, iou, a.alpha, a.gamma) : negative_example<Math<T>>(s, weight);
    sum += term.loss;
    if (gradient) gradient[c] = term.gradient * scale;
  }
  const double loss = double(team_sum(sum));
  return label < row.classes ? loss : std::numeric_limits<double>::quiet_NaN();
}

// Eight numbers of a query, in stores of 16 bytes.
__device__ __forceinline__ void put_gradient(float* to, const float (&x)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void put_gradient(double* to, const double (&x)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) to[k] = x[k];
}

// L1 and GIoU of one query's box, with their gradients; returns the IoU. All zero without a target.
template <typename T>
__device__ __forceinline__ T box_losses(const LossArguments<T>& a, int64_t query, int64_t target, T scale,
                                        ThreadSums& sums) {
  if (target < 0) {
    const T zeros[8] = {};
    put_gradient(a.boxes_gradient + 8 * query, zeros);
    return 0;
  }
  const CentreBox<T> box = read_box<T>(a.boxes, query), goal = target_box<T>(a.target_boxes, target);
  const Corners<T> corners = corners_of(box), goal_corners = corners_of(goal);
  const Overlap<T> overlap = overlap_of(corners, goal_corners);
  sums.matched += 1;
  sums.box_loss += double(l1_distance(box, goal));
  sums.giou_loss += double(1 - giou_or_nan(box, goal, a.guard));
  const CentreBox<T> giou = giou_loss_gradient(corners, goal_corners, overlap, a.guard);
  const T parts[8] = {sign(box.cx - goal.cx),
                      sign(box.cy - goal.cy),
                      sign(box.w - goal.w),
                      sign(box.h - goal.h),
                      giou.cx,
                      giou.cy,
                      giou.w,
                      giou.h};
  T gradient[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) gradient[k] = parts[k] * scale;
  put_gradient(a.boxes_gradient + 8 * query, gradient);
  return iou_of(overlap, a.guard);
}

// Class loss and error of the block's queries, four for each team.
template <typename T, typename E>
__device__ __forceinline__ void class_losses(const LossArguments<T>& a, int64_t first_query, int count,
                                             const int* target_of_query, const T* iou_of_query, T scale,
                                             ThreadSums& sums) {
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
    if (is_softmax(a.kind)) {
      const int64_t last = a.classes - 1;
      const int64_t wanted = target < 0 ? last : label < last ? label : -1;  // a target's label is never "no object"
      loss = cross_entropy(a, row, larger(peaks.last, peaks.others), wanted, scale, gradient);
    } else {
      const int64_t wanted = target < 0 ? -1 : label >= 0 ? label : a.classes;
      loss = sigmoid_losses(a, row, wanted, iou_of_query[is_query ? query : 0], scale, gradient);
    }
    if (lane != 0 || !is_query) continue;
    sums.class_loss += loss;
    sums.objects_predicted += peaks.others >= peaks.last;
    sums.correct += target >= 0 && correct;
  }
}

// Adds up one layer's images by a warp: losses, in the order of kTerms.
template <typename T>
__device__ __forceinline__ void reduce_layer(const LossLaunch<T>& launch, int layer) {
  const LossArguments<T>& a = launch.arguments;
  const Batch& batch = a.batch;
  const int lane = threadIdx.x % kWarpSize, images = int(batch.images), parts = images * launch.tiles;
  const Partial* own = launch.partials + int64_t(layer) * parts;
  double class_loss = 0, box_loss = 0, giou_loss = 0, correct = 0, matched = 0, cardinality = 0;
  for (int k = lane; k < parts; k += kWarpSize) {
    class_loss += own[k].class_loss;
    box_loss += own[k].box_loss;
    giou_loss += own[k].giou_loss;
    correct += own[k].correct;
    matched += own[k].matched;
  }
  for (int b = lane; b < images; b += kWarpSize) {
    const Segment segment = segment_of(batch, b);
    double objects = 0;
    for (int tile = 0; tile < launch.tiles; ++tile) objects += own[b * launch.tiles + tile].objects_predicted;
    cardinality += fabs(objects - double(segment.end - segment.begin));
  }
  class_loss = warp_sum(class_loss);
  box_loss = warp_sum(box_loss);
  giou_loss = warp_sum(giou_loss);
  correct = warp_sum(correct);
  matched = warp_sum(matched);
  cardinality = warp_sum(cardinality);
  if (lane != 0) return;
  const double class_scale = double(T(1 / own->class_normaliser)), box_scale = double(T(1 / box_normaliser(a)));
  T* losses = a.losses + layer * kTerms;
  losses[0] = T(class_loss * class_scale);
  losses[1] = T(box_loss * box_scale);
  losses[2] = T(giou_loss * box_scale);
  losses[3] = T(cardinality / double(images));
  losses[4] = T(matched > 0 ? 100 - 100 * correct / matched : 100);
}

// By the last block.
template <typename T>
__device__ __forceinline__ void reduce_losses(const LossLaunch<T>& launch) {
  const LossArguments<T>& a = launch.arguments;
  const int layers = int(a.batch.layers);
  for (int layer = threadIdx.x / kWarpSize; layer < layers; layer += kWarps) reduce_layer(launch, layer);
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  double total = 0;
  for (int k = threadIdx.x; a.loss_weight && k < layers * kTerms; k += kWarpSize)
    if (a.loss_weight[k] != 0) total += double(a.losses[k]) * double(a.loss_weight[k]);
  total = warp_sum(total);
  if (threadIdx.x == 0) *a.total = T(total);
}

// Adds up what the threads of a block have found; by thread 0.
__device__ __forceinline__ void store_partial(const ThreadSums& own, double class_normaliser, WarpParts& parts,
                                              Partial* to) {
  const int warp = threadIdx.x / kWarpSize;
  const double class_loss = warp_sum(own.class_loss), box_loss = warp_sum(own.box_loss);
  const double giou_loss = warp_sum(own.giou_loss);
  const unsigned correct = __reduce_add_sync(kAllLanes, own.correct);
  const unsigned matched = __reduce_add_sync(kAllLanes, own.matched);
  const unsigned objects_predicted = __reduce_add_sync(kAllLanes, own.objects_predicted);
  if (threadIdx.x % kWarpSize == 0) {
    parts.class_loss[warp] = class_loss;
    parts.box_loss[warp] = box_loss;
    parts.giou_loss[warp] = giou_loss;
    parts.correct[warp] = correct;
    parts.matched[warp] = matched;
    parts.objects_predicted[warp] = objects_predicted;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Partial sums = {};
  sums.class_normaliser = class_normaliser;
  for (int w = 0; w < kWarps; ++w) {
    sums.class_loss += parts.class_loss[w];
    sums.box_loss += parts.box_loss[w];
    sums.giou_loss += parts.giou_loss[w];
    sums.correct += parts.correct[w];
    sums.matched += parts.matched[w];
    sums.objects_predicted += parts.objects_predicted[w];
  }
  *to = sums;
}

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(double) ? 1 : 4)
    set_loss_kernel(const LossLaunch<T> launch) {
  __shared__ int target_of_query[kMostTile];
  __shared__ T iou_of_query[kMostTile];
  __shared__ WarpParts parts;
  __shared__ bool is_last;
  const LossArguments<T>& a = launch.arguments;
  const Batch& batch = a.batch;
  const int queries = int(batch.queries);
  const unsigned number = blockIdx.x / unsigned(launch.tiles);
  const int start = int(blockIdx.x % unsigned(launch.tiles)) * launch.tile;
  const int count = smaller(launch.tile, queries - start);
  const int layer = int(number / unsigned(batch.images)), image = int(number % unsigned(batch.images));
  const int64_t first_query = int64_t(number) * queries + start;

  if (threadIdx.x < kMostTile) target_of_query[threadIdx.x] = -1;
  const double normaliser = class_normaliser(a, layer, parts);
  __syncthreads();
  const Segment segment = segment_of(batch, image);
  for (int t = segment.begin + int(threadIdx.x); t < segment.end; t += kThreads) {
    const int64_t query = int64_t(a.query_of_target[layer * batch.targets + t]) - start;
    if (query >= 0 && query < count) atomicMax(&target_of_query[query], t);
  }
  __syncthreads();

  ThreadSums sums;
  if (int(threadIdx.x) < count)
    iou_of_query[threadIdx.x] =
        box_losses(a, first_query + threadIdx.x, target_of_query[threadIdx.x], T(1 / box_normaliser(a)), sums);
  __syncthreads();
  class_losses<T, E>(a, first_query, count, target_of_query, iou_of_query, T(1 / normaliser), sums);
  store_partial(sums, normaliser, parts, launch.partials + blockIdx.x);
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(launch.arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  reduce_losses(launch);
}

template <typename T>
void enqueue(const LossArguments<T>& a, void* scratch, void* stream) {
  const int64_t tiles = tiles_of(a.batch), blocks = a.batch.layers * a.batch.images * tiles;
  auto* partials = static_cast<Partial*>(scratch);
  auto* arrived = reinterpret_cast<unsigned*>(partials + blocks);
  check(cudaMemsetAsync(arrived, 0, sizeof *arrived, static_cast<cudaStream_t>(stream)), "set_loss");
  const LossLaunch<T> arguments = {a, tile_of(a.batch), static_cast<int>(tiles), partials, arrived};
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
  return batch.layers * batch.images * tiles_of(batch) * sizeof(Partial) + sizeof(unsigned);
}

void set_loss(const LossArguments<float>& a, void* scratch, void* stream) { enqueue(a, scratch, stream); }
void set_loss(const LossArguments<double>& a, void* scratch, void* stream) { enqueue(a, scratch, stream); }

}  // namespace detr::cuda
