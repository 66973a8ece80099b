// Sigmoid terms of class costs and losses, for scalars and for SIMD lanes. `Math` supplies exp, log and log1p for V.
// Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; cost: Zhu et al., "Deformable DETR", ICLR 2021; soft
// goals: Zhang et al., "VarifocalNet", CVPR 2021 (varifocal), Huang et al., "DEIM", CVPR 2025 (mal), Chen et al.,
// "LW-DETR", 2024, after Cai et al., "Align-DETR", 2023 (ia_bce).
#pragma once

#include "../kernels.h"

namespace detr {

// p = sigmoid(x) and both logarithms, without cancellation; the limits where x is infinite.
template <typename V>
struct Sigmoid {
  V p, q;                      // p and 1 - p
  V minus_log_p, minus_log_q;  // softplus(-x), softplus(x)
};

template <typename Math, typename V>
DETR_HD Sigmoid<V> sigmoid_of(V x) {
  const V zero{};
  const V e = Math::exp(-magnitude(x));
  const V log1p = Math::log1p(e);
  const V large = 1 / (e + 1), small = e * large;
  return {x >= zero ? large : small, x >= zero ? small : large, larger(-x, zero) + log1p, larger(x, zero) + log1p};
}

// base^gamma for base in [0, 1].
template <typename Math, typename V, typename T>
DETR_HD V power_of(V base, T gamma) {
  if (gamma == 2) return base * base;
  const V zero = base - base;
  return base > zero ? Math::exp(gamma * Math::log(base)) : (gamma == 0 ? zero + 1 : zero);
}

// Positive minus negative focal term, with `epsilon` inside the logarithms (`stable` leaves it out). Each form computes
// only what it needs, which saves a third of the time on a CPU.
template <typename Math, typename V, typename T>
DETR_HD V focal_cost(V x, T alpha, T gamma, bool stable, T epsilon) {
  const Sigmoid<V> s = sigmoid_of<Math>(x);
  if (stable) {
    const V positive = alpha * power_of<Math>(s.q, gamma) * s.minus_log_p;
    return positive - (1 - alpha) * power_of<Math>(s.p, gamma) * s.minus_log_q;
  }
  const V positive = alpha * power_of<Math>(1 - s.p, gamma) * -Math::log(s.p + epsilon);
  return positive - (1 - alpha) * power_of<Math>(s.p, gamma) * -Math::log(1 - s.p + epsilon);
}

// Loss of one logit and its derivative.
template <typename V>
struct ClassTerm {
  V loss, gradient;
};

template <typename Math, typename V, typename T>
DETR_HD ClassTerm<V> focal_positive(Sigmoid<V> s, T alpha, T gamma) {
  const V weight = alpha * power_of<Math>(s.q, gamma);
  return {weight * s.minus_log_p, weight * (-gamma * s.p * s.minus_log_p - s.q)};
}

// How the negative examples of a loss are weighted: factor p^gamma, through which a gradient may pass or not.
template <typename T>
struct NegativeWeight {
  T factor, gamma;
  bool passes_gradient;
};

template <typename T>
DETR_HD NegativeWeight<T> negative_weight(LossKind kind, T alpha, T gamma) {
  if (kind == LossKind::kFocal) return {1 - alpha, gamma, true};
  if (kind == LossKind::kIaBce) return {T(1), gamma, true};
  return {alpha, gamma, false};
}

template <typename Math, typename V, typename T>
DETR_HD ClassTerm<V> negative_example(Sigmoid<V> s, NegativeWeight<T> w) {
  const V weight = w.factor * power_of<Math>(s.p, w.gamma);
  const V slope = w.passes_gradient ? w.gamma * s.q * s.minus_log_q + s.p : s.p;
  return {weight * s.minus_log_q, weight * slope};
}

// A positive example: of the focal loss, or with a goal that follows the IoU of its box, which is a constant here.
template <typename Math, typename T>
DETR_HD ClassTerm<T> positive_example(LossKind kind, Sigmoid<T> s, T iou, T alpha, T gamma) {
  if (kind == LossKind::kFocal) return focal_positive<Math>(s, alpha, gamma);
  T goal = iou, weight = 1;
  if (kind == LossKind::kVarifocal) weight = iou;
  if (kind == LossKind::kMal) goal = power_of<Math>(iou, gamma);
  if (kind == LossKind::kIaBce) {
    goal = power_of<Math>(s.p, alpha) * power_of<Math>(iou, 1 - alpha);
    goal = larger(goal, T(0.01));
  }
  if (iou != iou) goal = iou;  // boxes without area
  return {weight * (goal * s.minus_log_p + (1 - goal) * s.minus_log_q), weight * ((1 - goal) * s.p - goal * s.q)};
}

}  // namespace detr
