// Runs every CUDA kernel in the emulator on random problems: built with AddressSanitizer and UndefinedBehaviorSanitizer
// by test_sanitizers.py. All arrays have exactly the size that the kernels are told.
#include <cstdio>
#include <cstring>

#include "../../csrc/kernels.h"
#include "../emulator/emulator.h"
#include "random.h"

namespace {

using namespace detr;

// Device memory as the ops allocate it: exactly so many bytes, all of them 1.
std::vector<unsigned char> scratch_of(int64_t bytes) { return std::vector<unsigned char>(bytes, 0xff); }

std::vector<int32_t> random_offsets(int64_t images, int64_t most) {
  std::vector<int32_t> offsets = {0};
  for (int64_t b = 0; b < images; ++b) offsets.push_back(offsets.back() + static_cast<int32_t>(integer(0, most)));
  return offsets;
}

template <typename T>
bool assignment_is_sound(int64_t most_queries, int64_t most_targets) {
  // Now and then so little shared memory that the scratch is used.
  emulator::use_shared_memory_limit(integer(0, 3) == 0 ? integer(2, 16) * 1024 : size_t(1) << 20);
  const int64_t layers = integer(1, 2), images = integer(1, 3), groups = integer(1, 3);
  const int64_t width = integer(1, most_queries), queries = groups * width;
  const int64_t most = integer(0, most_targets);
  const std::vector<int32_t> offsets = random_offsets(images, most);
  const int64_t targets = offsets.back() + integer(0, 2);
  const std::vector<T> cost = costs<T>(layers * targets * queries);
  std::vector<int32_t> query_of_target(layers * targets * groups);
  std::vector<T> target_price(layers * targets * groups), query_price(layers * images * queries);
  const Batch batch = {layers, images, queries, targets, offsets.data()};
  const auto type = sizeof(T) == 8 ? ElementType::kFloat64 : ElementType::kFloat32;
  const auto plan = cuda::assign_plan(batch, groups, most, type);
  auto scratch = scratch_of(layers * images * groups * int64_t(plan.scratch_bytes));
  cuda::assign(AssignmentArguments<T>{batch, groups, cost.data(), query_of_target.data(), target_price.data(),
                                      query_price.data()},
               nullptr, plan, scratch.data(), nullptr);
  return are_one_to_one(batch, groups, cost.data(), query_of_target.data());
}

// Numbers of 2, 4 or 8 bytes, as the type wants them.
std::vector<unsigned char> elements(ElementType type, const std::vector<float>& numbers) {
  const size_t size = type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
  std::vector<unsigned char> bytes(numbers.size() * size);
  for (size_t k = 0; k < numbers.size(); ++k) {
    const double wide = numbers[k];
    uint32_t bits;
    std::memcpy(&bits, &numbers[k], 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);  // bfloat16; read as float16 it is some number as well
    std::memcpy(bytes.data() + k * size,
                size == 8   ? static_cast<const void*>(&wide)
                : size == 4 ? &numbers[k]
                            : static_cast<const void*>(&half),
                size);
  }
  return bytes;
}

constexpr std::pair<ClassKind, LossKind> kKinds[] = {{ClassKind::kSoftmax, LossKind::kSoftmax},
                                                     {ClassKind::kFocal, LossKind::kFocal},
                                                     {ClassKind::kFocalStable, LossKind::kVarifocal},
                                                     {ClassKind::kFocal, LossKind::kMal},
                                                     {ClassKind::kFocalStable, LossKind::kIaBce}};

template <typename T>
bool matching_is_sound_and_loss_runs(ClassKind kind, LossKind loss_kind) {
  emulator::use_shared_memory_limit(size_t(1) << 20);
  const int64_t layers = integer(1, 3), images = integer(1, 3), groups = integer(1, 3);
  const int64_t queries = groups * integer(1, 140 / groups);
  const int64_t classes = integer(0, 5) == 0 ? integer(380, 390) : integer(1, 40);
  const std::vector<int32_t> offsets = random_offsets(images, 12);
  const int64_t targets = offsets.back() + integer(0, 2), slots = layers * images * queries;
  const ElementType types[] = {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16};
  const ElementType type = sizeof(T) == 8 ? ElementType::kFloat64 : types[integer(0, 2)];
  std::vector<float> logits = numbers(slots * classes, -5, 5);
  if (integer(0, 4) == 0) logits[integer(0, slots * classes - 1)] = std::nanf("");
  const auto logit_bytes = elements(type, logits), box_bytes = elements(type, numbers(slots * 4, 0, 1));
  const std::vector<float> target_boxes = numbers(targets * 4, 0, 1);
  std::vector<int64_t> labels(targets);
  for (int64_t& label : labels) label = integer(-1, classes);

  const Batch batch = {layers, images, queries, targets, offsets.data()};
  const Elements logit_elements = {logit_bytes.data(), type}, box_elements = {box_bytes.data(), type};
  const AreaGuard<T> guard = {T(integer(0, 1) * 1e-7), T(integer(0, 1) * 1e-6)};
  const CostArguments<T> cost_arguments = {
      batch, groups, classes, logit_elements, box_elements, labels.data(), target_boxes.data(), 1, 5,
      2,     kind,   T(0.25), T(2),           T(1e-8),      guard};
  std::vector<int64_t> status(2);
  std::vector<T> cost(layers * targets * queries);
  std::vector<uint64_t> minima(layers * targets * groups * cuda::minima_segments(queries / groups));
  const bool with_minima = integer(0, 1) == 1 && sizeof(T) == sizeof(float);
  cuda::matching_cost(cost_arguments, cost.data(), with_minima ? minima.data() : nullptr, status.data(), nullptr);

  bool sound = true;
  std::vector<int32_t> query_of_target(layers * targets * groups);
  if constexpr (sizeof(T) == sizeof(float)) {  // from the minima that the cost kernel left
    const auto plan = cuda::assign_plan(batch, groups, 12, ElementType::kFloat32);
    auto scratch = scratch_of(layers * images * groups * int64_t(plan.scratch_bytes));
    cuda::assign({batch, groups, cost.data(), query_of_target.data(), nullptr, nullptr},
                 with_minima ? minima.data() : nullptr, plan, scratch.data(), nullptr);
    sound = are_one_to_one(batch, groups, cost.data(), query_of_target.data());
  }
  query_of_target.resize(layers * targets);
  for (int32_t& query : query_of_target) query = static_cast<int32_t>(integer(-2, queries + 1));
  const std::vector<float> class_weight(classes, 1), loss_weight(layers * kTerms, 1);
  const float num_boxes = 3;
  std::vector<T> losses(layers * kTerms), total(1), logits_gradient(slots * classes), boxes_gradient(slots * 8);
  const cuda::LossArguments<T> loss_arguments = {batch,
                                                 classes,
                                                 logit_elements,
                                                 box_elements,
                                                 query_of_target.data(),
                                                 labels.data(),
                                                 target_boxes.data(),
                                                 integer(0, 1) ? &num_boxes : nullptr,
                                                 integer(0, 1) ? class_weight.data() : nullptr,
                                                 integer(0, 1) ? loss_weight.data() : nullptr,
                                                 loss_kind,
                                                 T(0.25),
                                                 T(2),
                                                 guard,
                                                 losses.data(),
                                                 total.data(),
                                                 logits_gradient.data(),
                                                 boxes_gradient.data()};
  auto scratch = scratch_of(int64_t(cuda::set_loss_scratch_bytes(batch)));
  cuda::set_loss(loss_arguments, scratch.data(), nullptr);

  std::vector<unsigned char> scaled_logits(logit_bytes.size()), scaled_boxes(box_bytes.size());
  const ScaleArguments<T> scale_arguments = {layers,
                                             images * queries * classes,
                                             images * queries,
                                             losses.data(),
                                             total.data(),
                                             loss_weight.data(),
                                             logits_gradient.data(),
                                             boxes_gradient.data(),
                                             scaled_logits.data(),
                                             type,
                                             scaled_boxes.data(),
                                             type};
  cuda::scale_gradients(scale_arguments, nullptr);
  return sound;
}

void run_union() {
  const int64_t sets = integer(1, 8), images = integer(1, 3), queries = integer(0, 600);
  const std::vector<int32_t> offsets = random_offsets(images, 12);
  const int64_t targets = offsets.back() + integer(0, 2);
  std::vector<int32_t> query_of_target(sets * targets), united(sets * targets);
  for (int32_t& query : query_of_target) query = static_cast<int32_t>(integer(-2, queries + 1));
  cuda::unite({{sets, images, queries, targets, offsets.data()}, query_of_target.data(), united.data()}, nullptr);
}

template <typename T>
bool run() {
  for (int n = 0; n < 150; ++n) {
    emulator::use_schedule(n);
    if (!assignment_is_sound<T>(50, 70)) return false;
  }
  for (int n = 0; n < 8; ++n)  // one for each search
    if (!assignment_is_sound<T>(320, 300)) return false;
  for (int n = 0; n < 8; ++n) {
    emulator::use_schedule(n);
    for (const auto& [kind, loss_kind] : kKinds)
      if (!matching_is_sound_and_loss_runs<T>(kind, loss_kind)) return false;
  }
  return true;
}

}  // namespace

int main() {
  for (int n = 0; n < 60; ++n) {
    emulator::use_schedule(n);
    run_union();
  }
  const bool sound = run<float>() && run<double>();
  std::puts(sound ? "sound" : "an assignment is not one to one");
  return sound ? 0 : 1;
}
