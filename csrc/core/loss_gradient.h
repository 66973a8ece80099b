// What comes back to a loss in the backward pass.
#pragma once

#include "../kernels.h"
#include "box.h"

namespace detr {

// gradient * factor, 0 where nothing comes in: a term that nobody uses may be NaN.
template <typename T>
DETR_HD T scaled(T gradient, T factor) {
  return factor == 0 ? T(0) : gradient * factor;
}

// The gradient of one term of a layer: its own, and its share of the weighted sum's.
template <typename T>
DETR_HD T incoming_gradient(const ScaleArguments<T>& a, int64_t layer, int term) {
  const int64_t k = layer * kTerms + term;
  const T own = a.loss_gradient ? a.loss_gradient[k] : T(0);
  if (!a.total_gradient || !a.loss_weight) return own;
  return own + scaled(*a.total_gradient, T(a.loss_weight[k]));
}

}  // namespace detr
