// Backward of the set loss: the gradients that the forward kernel left, times what comes in for their layer's losses.
// A thread scales four logits or one number of a box. Memory: each gradient read and written once.
#include "../core/loss_gradient.h"
#include "../kernels.h"
#include "elements.h"
#include "launch.h"

namespace detr::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = 4;  // logits of a thread

// Blocks of each layer: first those of the logits, then those of the boxes.
template <typename T>
struct ScaleLaunch {
  ScaleArguments<T> arguments;
  unsigned logit_blocks, box_blocks;  // of a layer
};

template <typename T, typename E>
__global__ void __launch_bounds__(kThreads) scale_gradients_kernel(const ScaleLaunch<T> launch) {
  const ScaleArguments<T>& a = launch.arguments;
  const unsigned blocks = launch.logit_blocks + launch.box_blocks;
  const int64_t layer = blockIdx.x / blocks;
  const unsigned block = blockIdx.x % blocks;
  if (block < launch.logit_blocks) {
    const T factor = incoming_gradient(a, layer, 0);
    const int64_t begin = int64_t(block) * kThreads * kElements + threadIdx.x;
    E* to = static_cast<E*>(a.scaled_logits) + layer * a.logits_per_layer;
    const T* from = a.logits_gradient + layer * a.logits_per_layer;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      const int64_t at = begin + k * kThreads;
      if (at < a.logits_per_layer) put(to + at, scaled(from[at], factor));
    }
    return;
  }
  // A thread writes one number of a box.
  const int64_t at = int64_t(block - launch.logit_blocks) * kThreads + threadIdx.x;
  if (at >= 4 * a.queries_per_layer) return;
  const T* parts = a.boxes_gradient + (layer * a.queries_per_layer + at / 4) * 8 + at % 4;
  const T gradient =
      scaled(parts[0], incoming_gradient(a, layer, 1)) + scaled(parts[4], incoming_gradient(a, layer, 2));
  with_element_type(a.boxes_type, [&](auto tag) {
    put(static_cast<decltype(tag)*>(a.scaled_boxes) + layer * 4 * a.queries_per_layer + at, gradient);
  });
}

template <typename T>
void enqueue(const ScaleArguments<T>& a, void* stream) {
  const auto blocks_of = [](int64_t items, int each) { return unsigned((items + each - 1) / each); };
  const ScaleLaunch<T> arguments = {a, blocks_of(a.logits_per_layer, kThreads * kElements),
                                    blocks_of(4 * a.queries_per_layer, kThreads)};
  const int64_t blocks = a.layers * (arguments.logit_blocks + arguments.box_blocks);
  with_element_type(a.logits_type, [&](auto tag) {
    launch("scale_gradients", scale_gradients_kernel<T, decltype(tag)>, blocks, kThreads, 0, stream, arguments);
  });
}

}  // namespace

void scale_gradients(const ScaleArguments<float>& a, void* stream) { enqueue(a, stream); }
void scale_gradients(const ScaleArguments<double>& a, void* stream) { enqueue(a, stream); }

}  // namespace detr::cuda
