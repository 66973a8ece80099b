// Runs every CPU kernel on random problems: built with AddressSanitizer and UndefinedBehaviorSanitizer by
// test_sanitizers.py. Scratch memory has exactly the size asked for, starts as NaN and moves at every call.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cpu/matching_union.h"
#include "../../csrc/cpu/set_loss.h"
#include "random.h"

namespace detr::cpu {

void* scratch(Scratch which, size_t bytes) {
  static void* blocks[2] = {nullptr, nullptr};
  void*& block = blocks[static_cast<int>(which)];
  std::free(block);
  const size_t size = (bytes + 63) / 64 * 64;
  block = std::aligned_alloc(64, size);
  if (block) std::memset(block, 0xff, size);
  return block;
}

}  // namespace detr::cpu

namespace {

using namespace detr;
using namespace detr::cpu;

template <typename T>
bool assignment_is_sound() {
  const int64_t targets = integer(0, 40), queries = integer(1, 50), groups = integer(1, 3);
  const int64_t stride = groups * queries;
  const std::vector<T> cost = costs<T>(targets * stride);
  const int32_t offsets[] = {0, static_cast<int32_t>(targets)};
  std::vector<int32_t> query_of_target(targets * groups);
  std::vector<T> target_price(targets * groups), query_price(stride);
  const Batch batch = {1, 1, stride, targets, offsets};
  assign<T>({batch, groups, cost.data(), query_of_target.data(), target_price.data(), query_price.data()}, 0, groups);
  return are_one_to_one(batch, groups, cost.data(), query_of_target.data());
}

constexpr std::pair<ClassKind, LossKind> kKinds[] = {{ClassKind::kSoftmax, LossKind::kSoftmax},
                                                     {ClassKind::kFocal, LossKind::kFocal},
                                                     {ClassKind::kFocalStable, LossKind::kVarifocal},
                                                     {ClassKind::kFocal, LossKind::kMal},
                                                     {ClassKind::kFocalStable, LossKind::kIaBce}};

template <typename T>
bool matching_is_sound_and_loss_runs(ClassKind kind, LossKind loss_kind) {
  const int64_t layers = integer(1, 3), images = integer(1, 3), groups = integer(1, 3), classes = integer(1, 40);
  const int64_t queries = groups * integer(1, 30), problems = layers * images * groups;
  std::vector<int32_t> offsets = {0};
  for (int64_t b = 0; b < images; ++b) offsets.push_back(offsets.back() + static_cast<int32_t>(integer(0, 12)));
  const int64_t targets = offsets.back(), slots = layers * images * queries;
  std::vector<float> logits = numbers(slots * classes, -5, 5);
  const std::vector<float> boxes = numbers(slots * 4, 0, 1), target_boxes = numbers(targets * 4, 0, 1);
  if (integer(0, 4) == 0) logits[integer(0, slots * classes - 1)] = std::nanf("");
  std::vector<int64_t> labels(targets);
  for (int64_t& label : labels) label = integer(0, classes - 1);

  const Batch batch = {layers, images, queries, targets, offsets.data()};
  const Elements logit_elements = {logits.data(), ElementType::kFloat32};
  const Elements box_elements = {boxes.data(), ElementType::kFloat32};
  const AreaGuard<T> guard = {T(integer(0, 1) * 1e-7), T(integer(0, 1) * 1e-6)};
  CostArguments<T> cost_arguments = {
      batch, groups, classes, logit_elements, box_elements, labels.data(), target_boxes.data(), 1, 5,
      2,     kind,   T(0.25), T(2),           T(1e-8),      guard};
  std::vector<int32_t> query_of_group(layers * targets * groups, -1), query_of_target(layers * targets, -1);
  std::vector<Forbidden> forbidden(problems);
  std::vector<T> cost(layers * targets * queries);
  match<T>(cost_arguments, query_of_group.data(), forbidden.data(), 0, problems);
  cost_arguments.groups = 1;
  match<T>(cost_arguments, query_of_target.data(), forbidden.data(), 0, layers * images);
  matching_cost<T>(cost_arguments, cost.data(), forbidden.data(), 0, layers * images);
  const bool sound = are_one_to_one(batch, groups, cost.data(), query_of_group.data()) &&
                     are_one_to_one(batch, 1, cost.data(), query_of_target.data());

  const std::vector<T> class_weight(classes, 1), class_scale(layers, 1), incoming(layers * kTerms, 1), total(1, 1);
  const std::vector<float> loss_weight(layers * kTerms, 1);
  std::vector<LossSums> sums(layers * images);
  std::vector<T> logits_gradient(slots * classes), boxes_gradient(slots * 8);
  const LossArguments<T> loss_arguments = {batch,
                                           classes,
                                           logit_elements,
                                           box_elements,
                                           query_of_target.data(),
                                           labels.data(),
                                           target_boxes.data(),
                                           class_weight.data(),
                                           class_scale.data(),
                                           1,
                                           loss_kind,
                                           T(0.25),
                                           T(2),
                                           guard,
                                           sums.data(),
                                           logits_gradient.data(),
                                           boxes_gradient.data()};
  set_loss<T>(loss_arguments, 0, layers * images);

  std::vector<uint16_t> scaled_logits(slots * classes), scaled_boxes(slots * 4);
  const ScaleArguments<T> scale_arguments = {layers,
                                             images * queries * classes,
                                             images * queries,
                                             incoming.data(),
                                             total.data(),
                                             loss_weight.data(),
                                             logits_gradient.data(),
                                             boxes_gradient.data(),
                                             scaled_logits.data(),
                                             ElementType::kFloat16,
                                             scaled_boxes.data(),
                                             ElementType::kBFloat16};
  scale_gradients<T>(scale_arguments, 0, slots);
  return sound;
}

void run_union() {
  const int64_t sets = integer(1, 8), images = integer(1, 3), queries = integer(1, 40);
  std::vector<int32_t> offsets = {0};
  for (int64_t b = 0; b < images; ++b) offsets.push_back(offsets.back() + static_cast<int32_t>(integer(0, 12)));
  std::vector<int32_t> query_of_target(sets * offsets.back()), united(query_of_target.size());
  for (int32_t& query : query_of_target) query = static_cast<int32_t>(integer(-1, queries - 1));
  unite({{sets, images, queries, offsets.back(), offsets.data()}, query_of_target.data(), united.data()}, 0, images);
}

template <typename T>
bool run() {
  for (int n = 0; n < 1000; ++n)
    if (!assignment_is_sound<T>()) return false;
  for (int n = 0; n < 50; ++n)
    for (const auto& [kind, loss_kind] : kKinds)
      if (!matching_is_sound_and_loss_runs<T>(kind, loss_kind)) return false;
  return true;
}

}  // namespace

int main() {
  for (int n = 0; n < 200; ++n) run_union();
  const bool sound = run<float>() && run<double>();
  std::puts(sound ? "sound" : "an assignment is not one to one");
  return sound ? 0 : 1;
}
