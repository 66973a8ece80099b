// Sigmoid focal terms, for scalars and for SIMD lanes. `Math` supplies exp and log for V.
// Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; cost: Zhu et al., "Deformable DETR", ICLR 2021.
#pragma once

#include "box.h"

namespace detr {

// p = sigmoid(x) and both logarithms, without cancellation for any finite x.
template <typename V>
struct Sigmoid {
  V p, q;                      // p and 1 - p
  V minus_log_p, minus_log_q;  // softplus(-x), softplus(x)
};

template <typename Math, typename V>
DETR_HD Sigmoid<V> sigmoid_of(V x) {
  const V zero = x - x;
  const V e = Math::exp(-magnitude(x));
  const V sum = e + 1;
  // log1p(e): the rounding error of 1 + e is divided out again.
  const V rounded = sum - 1;
  const V log1p = rounded == zero ? e : Math::log(sum) * (e / rounded);
  const V large = 1 / sum, small = e / sum;
  return {x >= zero ? large : small, x >= zero ? small : large, larger(-x, zero) + log1p, larger(x, zero) + log1p};
}

// base^gamma for base in [0, 1].
template <typename Math, typename V, typename T>
DETR_HD V power_of(V base, T gamma) {
  if (gamma == 2) return base * base;
  const V zero = base - base;
  return base > zero ? Math::exp(gamma * Math::log(base)) : (gamma == 0 ? zero + 1 : zero);
}

// Positive minus negative focal term, with the published 1e-8 inside the logarithms (`stable` leaves it out).
template <typename Math, typename V, typename T>
DETR_HD V focal_cost(V x, T alpha, T gamma, bool stable) {
  const Sigmoid<V> s = sigmoid_of<Math>(x);
  const T epsilon = T(1e-8);
  const V minus_log_p = stable ? s.minus_log_p : -Math::log(s.p + epsilon);
  const V minus_log_q = stable ? s.minus_log_q : -Math::log(1 - s.p + epsilon);
  const V positive = alpha * power_of<Math>(stable ? s.q : 1 - s.p, gamma) * minus_log_p;
  const V negative = (1 - alpha) * power_of<Math>(s.p, gamma) * minus_log_q;
  return positive - negative;
}

// Focal loss of one logit and its derivative, for a positive and for a negative example.
template <typename V>
struct FocalTerm {
  V loss, gradient;
};

template <typename Math, typename V, typename T>
DETR_HD FocalTerm<V> focal_loss_positive(Sigmoid<V> s, T alpha, T gamma) {
  const V weight = alpha * power_of<Math>(s.q, gamma);
  return {weight * s.minus_log_p, weight * (-gamma * s.p * s.minus_log_p - s.q)};
}

template <typename Math, typename V, typename T>
DETR_HD FocalTerm<V> focal_loss_negative(Sigmoid<V> s, T alpha, T gamma) {
  const V weight = (1 - alpha) * power_of<Math>(s.p, gamma);
  return {weight * s.minus_log_q, weight * (gamma * s.q * s.minus_log_q + s.p)};
}

}  // namespace detr
