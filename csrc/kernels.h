// Every native kernel's entry point, free of any framework: raw pointers in, raw pointers out.
//
// Axes: L decoder layers, B images, Q queries, T targets of the whole batch (flat), C classes. Image b owns targets
// offsets[b] to offsets[b + 1]; targets past offsets[B] are ignored. A problem is one image in one layer, p = l * B +
// b; every function works on problems [begin, end), writes only what belongs to them, and may run on several threads.
// Where an image's queries are G groups of equal size, each of which is matched with all targets, a problem is one
// group, p = (l * B + b) * G + g.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/box.h"

namespace detr {

enum class ElementType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// A contiguous array of a floating type known at run time.
struct Elements {
  const void* data;
  ElementType type;
};

// How a class enters the cost.
enum class ClassKind {
  kSoftmax,      // probability over all C classes, the last of which is "no object"
  kFocal,        // sigmoid focal with an epsilon inside the logarithms, as published
  kFocalStable,  // sigmoid focal through log-sigmoid
};

// How a class enters the loss; in the last three a positive example's goal follows the IoU of its box.
enum class LossKind {
  kSoftmax,    // weighted cross-entropy over all C classes, the last of which is "no object"
  kFocal,      // sigmoid focal
  kVarifocal,  // varifocal (RT-DETR)
  kMal,        // matchability-aware (DEIM)
  kIaBce,      // IoU-aware binary cross-entropy (LW-DETR, RF-DETR)
};

constexpr bool is_softmax(ClassKind kind) { return kind == ClassKind::kSoftmax; }
constexpr bool is_softmax(LossKind kind) { return kind == LossKind::kSoftmax; }

// Labels that a target may have: below this. The last class of a softmax is "no object".
template <typename Kind>
constexpr int64_t label_limit(Kind kind, int64_t classes) {
  return is_softmax(kind) ? classes - 1 : classes;
}

// Terms that can make a pair impossible, as bits.
enum ForbiddenTerm : int64_t { kClassTerm = 1, kBoxTerm = 2, kGiouTerm = 4, kLabelTerm = 8, kSumTerm = 16 };

struct Batch {
  int64_t layers, images, queries, targets;
  const int32_t* offsets;  // [B + 1]
};

// A cost is a forbidden pair if it is NaN, infinite or at least this large: sums of costs never overflow.
template <typename T>
constexpr T kCostLimit = sizeof(T) == 4 ? T(0x1p100) : T(0x1p1000);

template <typename T>
struct AssignmentArguments {
  Batch batch;
  int64_t groups;
  const T* cost;             // [L, T, Q]
  int32_t* query_of_target;  // [L, T * G] in the order image, group, target, -1 = none
  T* target_price;           // [L, T * G], or null
  T* query_price;            // [L, B, Q], or null
};

template <typename T>
struct CostArguments {
  Batch batch;
  int64_t groups, classes;
  Elements logits;            // [L, B, Q, C]
  Elements boxes;             // [L, B, Q, 4] cxcywh
  const int64_t* labels;      // [T]
  const float* target_boxes;  // [T, 4] cxcywh
  T class_weight, box_weight, giou_weight;
  ClassKind kind;
  T alpha, gamma, class_epsilon;  // the last inside the logarithms of kFocal
  AreaGuard<T> guard;             // of GIoU
};

// Forbidden pairs of one problem.
struct Forbidden {
  int64_t count;
  int64_t first;  // packed position and term of the first one in (layer, image, target, query) order, INT64_MAX if none
};

// How `first` is packed, from the lowest bits up: term, query, target within its image, image, layer.
constexpr int kTermBits = 5, kQueryBits = 20, kTargetBits = 14, kImageBits = 16, kLayerBits = 8;

// Losses of a layer: class, L1, GIoU, cardinality error, class error.
constexpr int kTerms = 5;

// What one problem adds to each loss before normalisation.
struct LossSums {
  double class_loss, box_loss, giou_loss, objects_predicted, correct, matched;
};

template <typename T>
struct LossArguments {
  Batch batch;
  int64_t classes;
  Elements logits;                 // [L, B, Q, C]
  Elements boxes;                  // [L, B, Q, 4] cxcywh
  const int32_t* query_of_target;  // [L, T], -1 = unmatched
  const int64_t* labels;           // [T]
  const float* target_boxes;       // [T, 4] cxcywh
  const T* class_weight;           // [C], softmax only
  const T* class_scale;            // [L] 1 / normaliser of the class loss
  T box_scale;                     // 1 / number of boxes
  LossKind kind;
  T alpha, gamma;
  AreaGuard<T> guard;  // of GIoU
  LossSums* sums;      // [L, B]
  T* logits_gradient;  // [L, B, Q, C] of the normalised class loss
  T* boxes_gradient;   // [L, B, Q, 8] of the normalised L1 loss (4) and GIoU loss (4)
};

template <typename T>
struct ScaleArguments {
  int64_t layers, logits_per_layer, queries_per_layer;
  const T* loss_gradient;    // [L, kTerms] incoming, or null; the first three are class, L1, GIoU
  const T* total_gradient;   // [] incoming of the weighted sum, or null
  const float* loss_weight;  // [L, kTerms] of the weighted sum, or null
  const T* logits_gradient;  // [L, logits_per_layer]
  const T* boxes_gradient;   // [L, queries_per_layer, 8]
  void* scaled_logits;       // [L, logits_per_layer] of logits_type
  ElementType logits_type;
  void* scaled_boxes;  // [L, queries_per_layer, 4] of boxes_type
  ElementType boxes_type;
};

// Layers are the sets of predictions here.
struct UnionArguments {
  Batch batch;
  const int32_t* query_of_target;  // [S, T], -1 = none
  int32_t* united;                 // [S, T], -1 = none
};

namespace cpu {

// All kernels compiled for one instruction set.
struct Kernels {
  const char* name;
  // Whether some pair was forbidden. Rows past offsets[B] are not written.
  bool (*assign_float)(const AssignmentArguments<float>&, int64_t begin, int64_t end);
  bool (*assign_double)(const AssignmentArguments<double>&, int64_t begin, int64_t end);
  // cost [L, T, Q]; forbidden [L, B]. Groups make no difference.
  void (*matching_cost_float)(const CostArguments<float>&, float* cost, Forbidden*, int64_t begin, int64_t end);
  void (*matching_cost_double)(const CostArguments<double>&, double* cost, Forbidden*, int64_t begin, int64_t end);
  // query_of_target [L, T * G], as assign's; forbidden [L, B, G].
  void (*match_float)(const CostArguments<float>&, int32_t* query_of_target, Forbidden*, int64_t begin, int64_t end);
  void (*match_double)(const CostArguments<double>&, int32_t* query_of_target, Forbidden*, int64_t begin, int64_t end);
  void (*set_loss_float)(const LossArguments<float>&, int64_t begin, int64_t end);
  void (*set_loss_double)(const LossArguments<double>&, int64_t begin, int64_t end);
  // begin and end count queries of all layers here.
  void (*scale_gradients_float)(const ScaleArguments<float>&, int64_t begin, int64_t end);
  void (*scale_gradients_double)(const ScaleArguments<double>&, int64_t begin, int64_t end);
  // begin and end count images here; queries must be in [-1, Q); rows past offsets[B] are not written.
  void (*unite)(const UnionArguments&, int64_t begin, int64_t end);
};

// The best set for this processor, or the one chosen by use_instruction_set.
const Kernels& kernels();

// For tests: "portable", "avx2", "avx512". False if this processor or this build does not have it.
bool use_instruction_set(const char* name);

// Memory that belongs to the calling thread and is reused by its next call; aligned to 64 bytes.
enum class Scratch { kSolver, kCost };
void* scratch(Scratch which, size_t bytes);

}  // namespace cpu

// Every function enqueues its kernels on a stream of the current device and waits for nothing; pointers are to memory
// of that device, but for the arguments themselves. Nothing is allocated. A launch that fails throws
// std::runtime_error with the kernel's name.
namespace cuda {

// Memory of assign, known on the host.
struct AssignPlan {
  int64_t most_rows;     // which kernel
  size_t shared_bytes;   // of a block
  size_t scratch_bytes;  // of device memory, for each problem
};

// max_count: an upper bound of the targets of one image. type: kFloat32 or kFloat64.
AssignPlan assign_plan(const Batch&, int64_t groups, int64_t max_count, ElementType type);

// Parts of a row, of so many queries of a group, whose minima matching_cost delivers.
constexpr int64_t minima_segments(int64_t queries) { return (queries + 31) / 32; }

// Writes all of query_of_target, if offsets are segments of the rows; prices must be 0 before. minima: of matching_cost
// on the same cost, or null. scratch: plan.scratch_bytes for each problem. One launch.
void assign(const AssignmentArguments<float>&, const uint64_t* minima, const AssignPlan&, void* scratch, void* stream);
void assign(const AssignmentArguments<double>&, const uint64_t* minima, const AssignPlan&, void* scratch, void* stream);

// cost [L, T, Q], in rows past offsets[B] 0, or with minima unwritten. minima [L, T, G, minima_segments(Q / G)]: of
// each row and 32 queries of a group the least cost and its query within the group, for assign; or null, as for double.
// status: [2], or null: the number of forbidden pairs is added to the first, the second raised to INT64_MAX -
// Forbidden::first. One launch.
void matching_cost(const CostArguments<float>&, float* cost, uint64_t* minima, int64_t* status, void* stream);
void matching_cost(const CostArguments<double>&, double* cost, uint64_t* minima, int64_t* status, void* stream);

template <typename T>
struct LossArguments {
  Batch batch;
  int64_t classes;
  Elements logits;                 // [L, B, Q, C]
  Elements boxes;                  // [L, B, Q, 4] cxcywh
  const int32_t* query_of_target;  // [L, T], no query twice; outside of [0, Q) = unmatched
  const int64_t* labels;           // [T]; one out of range makes the class loss NaN
  const float* target_boxes;       // [T, 4] cxcywh
  const float* num_boxes;          // [], or null for offsets[B]; at least 1 is used
  const float* class_weight;       // [C], softmax only, or null for 1
  const float* loss_weight;        // [L, kTerms], or null for 0
  LossKind kind;
  T alpha, gamma;
  AreaGuard<T> guard;  // of GIoU
  T* losses;           // [L, kTerms]
  T* total;            // []
  T* logits_gradient;  // [L, B, Q, C] of the normalised class loss
  T* boxes_gradient;   // [L, B, Q, 8] of the normalised L1 loss (4) and GIoU loss (4)
};

// Bytes of device memory that set_loss needs beside its arguments.
size_t set_loss_scratch_bytes(const Batch&);

// One launch and one memset of four bytes.
void set_loss(const LossArguments<float>&, void* scratch, void* stream);
void set_loss(const LossArguments<double>&, void* scratch, void* stream);

// One launch.
void scale_gradients(const ScaleArguments<float>&, void* stream);
void scale_gradients(const ScaleArguments<double>&, void* stream);

// Writes all of united, unless there is no image; queries outside of [-1, Q) are none. At most 2^31 - 1 entries. One
// launch.
void unite(const UnionArguments&, void* stream);

}  // namespace cuda
}  // namespace detr
