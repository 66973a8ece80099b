// The targets of an image. Offsets are data: whatever they hold, no kernel leaves the arrays of targets.
#pragma once

#include "../core/box.h"
#include "../kernels.h"

namespace detr::cuda {

struct Segment {
  int begin, end;
};

__device__ __forceinline__ Segment segment_of(const Batch& batch, int image) {
  const int targets = int(batch.targets);
  const int begin = larger(smaller(batch.offsets[image], targets), 0);
  return {begin, larger(smaller(batch.offsets[image + 1], targets), begin)};
}

// Where the targets of the last image end.
__device__ __forceinline__ int end_of_targets(const Batch& batch) {
  return segment_of(batch, int(batch.images) - 1).end;
}

}  // namespace detr::cuda
