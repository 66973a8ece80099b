// Arithmetic of box pairs, for scalars and for SIMD lanes: L1, IoU, GIoU and their gradients.
// GIoU: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019.
#pragma once

#include <limits>

#if defined(__CUDACC__)
#define DETR_HD __host__ __device__ __forceinline__
#else
#define DETR_HD inline __attribute__((always_inline))
#endif

namespace detr {

template <typename V>
DETR_HD V smaller(V a, V b) {
  return a < b ? a : b;
}

template <typename V>
DETR_HD V larger(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
DETR_HD V magnitude(V x) {
  return x < 0 ? -x : x;
}

// A box as predicted and annotated: centre, width and height.
template <typename V>
struct CentreBox {
  V cx, cy, w, h;
};

template <typename V>
struct Corners {
  V x1, y1, x2, y2;
};

template <typename V>
DETR_HD Corners<V> corners_of(CentreBox<V> b) {
  return {b.cx - b.w / 2, b.cy - b.h / 2, b.cx + b.w / 2, b.cy + b.h / 2};
}

// Sum of the absolute differences of the four numbers.
template <typename V>
DETR_HD V l1_distance(CentreBox<V> a, CentreBox<V> b) {
  return magnitude(a.cx - b.cx) + magnitude(a.cy - b.cy) + magnitude(a.w - b.w) + magnitude(a.h - b.h);
}

// What GIoU and its gradient are made of. Areas come from corners, as in the published code.
template <typename V>
struct Overlap {
  V width, height;            // of the intersection; negative where the boxes are apart
  V hull_width, hull_height;  // of the smallest box around both
  V intersection, union_area, hull;
};

template <typename V>
DETR_HD Overlap<V> overlap_of(Corners<V> a, Corners<V> b) {
  Overlap<V> o;
  o.width = smaller(a.x2, b.x2) - larger(a.x1, b.x1);
  o.height = smaller(a.y2, b.y2) - larger(a.y1, b.y1);
  o.hull_width = larger(a.x2, b.x2) - smaller(a.x1, b.x1);
  o.hull_height = larger(a.y2, b.y2) - smaller(a.y1, b.y1);
  const V zero = o.width - o.width;
  o.intersection = larger(o.width, zero) * larger(o.height, zero);
  o.union_area = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - o.intersection;
  o.hull = o.hull_width * o.hull_height;
  return o;
}

// What keeps a code base's divisions by the union and by the hull from zero: max(area, floor) + added. Zeros in DETR.
template <typename T>
struct AreaGuard {
  T floor, added;
};

// NaN stays, and a guard of zeros changes no bit of an area.
template <typename V, typename T>
DETR_HD V guarded(V area, AreaGuard<T> guard) {
  const V floor = area - area + guard.floor;
  return (area < floor ? floor : area) + guard.added;
}

template <typename V, typename T>
DETR_HD V iou_of(Overlap<V> o, AreaGuard<T> guard) {
  return o.intersection / guarded(o.union_area, guard);
}

// Without a guard undefined (NaN) for two boxes without area.
template <typename V, typename T>
DETR_HD V giou_of(Overlap<V> o, AreaGuard<T> guard) {
  return iou_of(o, guard) - (o.hull - o.union_area) / guarded(o.hull, guard);
}

// NaN also for boxes of negative width or height.
template <typename V, typename T>
DETR_HD V giou_or_nan(CentreBox<V> a, CentreBox<V> b, AreaGuard<T> guard) {
  const V giou = giou_of(overlap_of(corners_of(a), corners_of(b)), guard);
  const V nan = giou * 0 + std::numeric_limits<float>::quiet_NaN();
  const V least_side = smaller(smaller(a.w, a.h), smaller(b.w, b.h));
  return least_side < 0 ? nan : giou;
}

// Sign of a difference, 0 at 0: the gradient of |x|.
template <typename T>
DETR_HD T sign(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : x - x;
}

// Share of the gradient that max(a, b) passes to a; ties are split, as in PyTorch.
template <typename T>
DETR_HD T share_of_larger(T a, T b) {
  return a > b ? T(1) : a == b ? T(0.5) : T(0);
}

// Gradient of 1 - GIoU with respect to box `a`, in cxcywh.
template <typename T>
DETR_HD CentreBox<T> giou_loss_gradient(Corners<T> a, Corners<T> b, Overlap<T> o, AreaGuard<T> guard) {
  const T joined = guarded(o.union_area, guard), hull = guarded(o.hull, guard);
  // An area below its floor passes no gradient on, but for the one in a numerator.
  const T by_union = o.union_area < guard.floor ? T(0) : o.intersection / (joined * joined);
  const T by_intersection = -1 / joined - by_union + 1 / hull;
  const T by_area = by_union - 1 / hull;
  const T by_hull = o.hull < guard.floor ? 1 / hull : (hull - o.hull + o.union_area) / (hull * hull);
  // clamp(min=0) passes the gradient on at equality.
  const T by_width = o.width >= 0 ? by_intersection * larger(o.height, T(0)) : T(0);
  const T by_height = o.height >= 0 ? by_intersection * larger(o.width, T(0)) : T(0);
  const T w = a.x2 - a.x1, h = a.y2 - a.y1;

  const T x2 =
      by_width * share_of_larger(b.x2, a.x2) + by_area * h + by_hull * o.hull_height * share_of_larger(a.x2, b.x2);
  const T x1 =
      -(by_width * share_of_larger(a.x1, b.x1) + by_area * h + by_hull * o.hull_height * share_of_larger(b.x1, a.x1));
  const T y2 =
      by_height * share_of_larger(b.y2, a.y2) + by_area * w + by_hull * o.hull_width * share_of_larger(a.y2, b.y2);
  const T y1 =
      -(by_height * share_of_larger(a.y1, b.y1) + by_area * w + by_hull * o.hull_width * share_of_larger(b.y1, a.y1));
  return {x1 + x2, y1 + y2, (x2 - x1) / 2, (y2 - y1) / 2};
}

}  // namespace detr
