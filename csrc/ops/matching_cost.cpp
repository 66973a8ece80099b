// The ops matching_cost and match.
#include <limits>
#include <tuple>

#include "checks.h"
#include "device.h"

namespace detr::ops {
namespace {

struct CostOptions {
  int64_t max_count, groups;
  double class_weight, box_weight, giou_weight;
  std::string kind;
  double alpha, gamma, class_epsilon, giou_floor, giou_epsilon;
};

template <typename T>
CostArguments<T> arguments_of(const char* op, const CostInputs& in, const CostOptions& options) {
  const Tensor& logits = in.logits;
  const Batch batch = batch_of(op, in.offsets, logits.size(0), logits.size(2), in.labels.size(0));
  check_groups(op, batch, options.groups);
  return {batch,
          options.groups,
          logits.size(3),
          elements(op, "logits", logits),
          elements(op, "boxes", in.boxes),
          in.labels.const_data_ptr<int64_t>(),
          in.target_boxes.const_data_ptr<float>(),
          T(options.class_weight),
          T(options.box_weight),
          T(options.giou_weight),
          class_kind(op, options.kind),
          T(options.alpha),
          T(options.gamma),
          T(options.class_epsilon),
          area_guard<T>(op, options.giou_floor, options.giou_epsilon)};
}

// The status packs a position into one integer.
void check_packable(const char* op, const Batch& batch, bool counts_are_on_host) {
  const auto check_fits = [op](const char* name, int64_t count, int bits) {
    check(count < int64_t(1) << bits, op, ": at most ", (int64_t(1) << bits) - 1, " ", name, ", got ", count);
  };
  check_fits("layers", batch.layers, kLayerBits);
  check_fits("images", batch.images, kImageBits);
  check_fits("queries", batch.queries, kQueryBits);
  if (!counts_are_on_host) return;
  for (int64_t b = 0; b < batch.images; ++b)
    check_fits("targets in one image", batch.offsets[b + 1] - batch.offsets[b], kTargetBits);
}

void check_status(const char* op, const std::optional<Tensor>& status) {
  if (!status) return;
  check_shape(op, "status", *status, {2}, "[2]");
  check_type(op, "status", *status, ScalarType::Long, "int64");
  check(status->is_contiguous(), op, ": status must be contiguous");
}

#if !defined(DETR_EMULATED)
// Adds the number of forbidden pairs; the earliest position wins over later ones.
void add_to_status(const std::optional<Tensor>& status, const std::vector<Forbidden>& forbidden) {
  if (!status) return;
  constexpr int64_t kNowhere = std::numeric_limits<int64_t>::max();
  int64_t* data = status->mutable_data_ptr<int64_t>();
  for (const Forbidden& problem : forbidden) {
    data[0] += problem.count;
    data[1] = std::max(data[1], kNowhere - problem.first);
  }
}

// Runs a kernel, which writes to `out`, for all problems.
template <typename T, typename Kernel, typename Out>
void run_on_host(const char* op, const CostArguments<T>& arguments, int64_t max_count,
                 const std::optional<Tensor>& status, Kernel kernel, Out* out) {
  const Batch& batch = arguments.batch;
  check_offsets(op, batch, max_count);
  check_packable(op, batch, true);
  std::vector<Forbidden> forbidden(batch.layers * batch.images * arguments.groups);
  const double targets = double(batch.targets) / std::max<int64_t>(batch.images, 1);
  const double work = double(batch.queries / arguments.groups) * (double(arguments.classes) + targets);
  in_parallel(int64_t(forbidden.size()), work,
              [&](int64_t begin, int64_t end) { kernel(arguments, out, forbidden.data(), begin, end); });
  add_to_status(status, forbidden);
}

template <typename T>
Tensor matching_cost_on_host(const CostInputs& in, const CostOptions& options, const std::optional<Tensor>& status) {
  const auto arguments = arguments_of<T>("matching_cost", in, options);
  const Batch& batch = arguments.batch;
  const bool full = batch.offsets[batch.images] == batch.targets;
  Tensor cost = full ? torch::stable::new_empty(in.logits, {batch.layers, batch.targets, batch.queries}, kScalarType<T>)
                     : new_filled(in.logits, {batch.layers, batch.targets, batch.queries}, kScalarType<T>, 0);
  const auto kernel = kernel_of<T>(cpu::kernels().matching_cost_float, cpu::kernels().matching_cost_double);
  run_on_host("matching_cost", arguments, options.max_count, status, kernel, cost.template mutable_data_ptr<T>());
  return cost;
}

Tensor matching_cost(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets,
                     std::optional<Tensor> status, int64_t max_count, double class_weight, double box_weight,
                     double giou_weight, std::string kind, double alpha, double gamma, double class_epsilon,
                     double giou_floor, double giou_epsilon) {
  const CostInputs in = checked_inputs("matching_cost", logits, boxes, labels, target_boxes, offsets);
  check_status("matching_cost", status);
  const CostOptions options = {max_count, 1,     class_weight,  box_weight, giou_weight, kind,
                               alpha,     gamma, class_epsilon, giou_floor, giou_epsilon};
  return needs_double(logits, boxes) ? matching_cost_on_host<double>(in, options, status)
                                     : matching_cost_on_host<float>(in, options, status);
}

template <typename T>
Tensor match_on_host(const CostInputs& in, const CostOptions& options, const std::optional<Tensor>& status) {
  const auto arguments = arguments_of<T>("match", in, options);
  const Batch& batch = arguments.batch;
  Tensor query_of_target = new_filled(in.logits, {batch.layers, batch.targets * options.groups}, ScalarType::Int, -1);
  const auto kernel = kernel_of<T>(cpu::kernels().match_float, cpu::kernels().match_double);
  run_on_host("match", arguments, options.max_count, status, kernel, query_of_target.mutable_data_ptr<int32_t>());
  return query_of_target;
}

Tensor match(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets,
             std::optional<Tensor> status, int64_t max_count, int64_t groups, double class_weight, double box_weight,
             double giou_weight, std::string kind, double alpha, double gamma, double class_epsilon, double giou_floor,
             double giou_epsilon) {
  const CostInputs in = checked_inputs("match", logits, boxes, labels, target_boxes, offsets);
  check_status("match", status);
  const CostOptions options = {max_count, groups, class_weight,  box_weight, giou_weight, kind,
                               alpha,     gamma,  class_epsilon, giou_floor, giou_epsilon};
  return needs_double(logits, boxes) ? match_on_host<double>(in, options, status)
                                     : match_on_host<float>(in, options, status);
}
#endif

#if defined(DETR_WITH_CUDA)
int64_t* status_data(const char* op, const std::optional<Tensor>& status, const Tensor& logits) {
  check_status(op, status);
  if (!status) return nullptr;
  check_device(op, "status", *status, logits, "logits");
  return status->mutable_data_ptr<int64_t>();
}

template <typename T>
Tensor new_cost(const Tensor& like, const Batch& batch) {
  return torch::stable::new_empty(like, {batch.layers, batch.targets, batch.queries}, kScalarType<T>);
}

template <typename T>
Tensor matching_cost_on_device(const CostInputs& in, const CostOptions& options, int64_t* status, void* stream) {
  const auto arguments = arguments_of<T>("matching_cost", in, options);
  check_packable("matching_cost", arguments.batch, false);
  Tensor cost = new_cost<T>(in.logits, arguments.batch);
  if (arguments.batch.images == 0) torch::stable::fill_(cost, 0);
  cuda::matching_cost(arguments, cost.template mutable_data_ptr<T>(), nullptr, status, stream);
  return cost;
}

Tensor matching_cost_cuda(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets,
                          std::optional<Tensor> status, int64_t max_count, double class_weight, double box_weight,
                          double giou_weight, std::string kind, double alpha, double gamma, double class_epsilon,
                          double giou_floor, double giou_epsilon) {
  const OnDevice device(logits);
  const CostInputs in = checked_inputs("matching_cost", logits, boxes, labels, target_boxes, offsets);
  check_devices("matching_cost", in);
  int64_t* found = status_data("matching_cost", status, logits);
  const CostOptions options = {max_count, 1,     class_weight,  box_weight, giou_weight, kind,
                               alpha,     gamma, class_epsilon, giou_floor, giou_epsilon};
  return needs_double(logits, boxes) ? matching_cost_on_device<double>(in, options, found, device.stream())
                                     : matching_cost_on_device<float>(in, options, found, device.stream());
}

template <typename T>
Tensor match_on_device(const CostInputs& in, const CostOptions& options, int64_t* status, void* stream) {
  const auto arguments = arguments_of<T>("match", in, options);
  const Batch& batch = arguments.batch;
  check_packable("match", batch, false);
  const int64_t groups = options.groups, most = options.max_count < 0 ? batch.targets : options.max_count;
  Tensor query_of_target = torch::stable::new_empty(in.logits, {batch.layers, batch.targets * groups}, ScalarType::Int);
  if (batch.images == 0) torch::stable::fill_(query_of_target, -1);
  Tensor cost = new_cost<T>(in.logits, batch);
  const int64_t segments = sizeof(T) == sizeof(float) ? groups * cuda::minima_segments(batch.queries / groups) : 0;
  const Tensor minima = torch::stable::new_empty(in.logits, {batch.layers, batch.targets, segments}, ScalarType::Long);
  auto* least = segments ? static_cast<uint64_t*>(minima.mutable_data_ptr()) : nullptr;
  cuda::matching_cost(arguments, cost.template mutable_data_ptr<T>(), least, status, stream);

  const ElementType type = sizeof(T) == sizeof(float) ? ElementType::kFloat32 : ElementType::kFloat64;
  const auto plan = cuda::assign_plan(batch, groups, most, type);
  const Tensor scratch = new_bytes(in.logits, batch.layers * batch.images * groups * int64_t(plan.scratch_bytes));
  const AssignmentArguments<T> assignment = {
      batch, groups, cost.template const_data_ptr<T>(), query_of_target.mutable_data_ptr<int32_t>(), nullptr, nullptr};
  cuda::assign(assignment, least, plan, scratch.mutable_data_ptr(), stream);
  return query_of_target;
}

Tensor match_cuda(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets,
                  std::optional<Tensor> status, int64_t max_count, int64_t groups, double class_weight,
                  double box_weight, double giou_weight, std::string kind, double alpha, double gamma,
                  double class_epsilon, double giou_floor, double giou_epsilon) {
  const OnDevice device(logits);
  const CostInputs in = checked_inputs("match", logits, boxes, labels, target_boxes, offsets);
  check_devices("match", in);
  int64_t* found = status_data("match", status, logits);
  const CostOptions options = {max_count, groups, class_weight,  box_weight, giou_weight, kind,
                               alpha,     gamma,  class_epsilon, giou_floor, giou_epsilon};
  return needs_double(logits, boxes) ? match_on_device<double>(in, options, found, device.stream())
                                     : match_on_device<float>(in, options, found, device.stream());
}
#endif

}  // namespace
}  // namespace detr::ops

STABLE_TORCH_LIBRARY_FRAGMENT(DETR_LIBRARY, m) {
  const std::string arguments =
      "(Tensor logits, Tensor boxes, Tensor labels, Tensor target_boxes, Tensor offsets, Tensor(a!)? status, "
      "SymInt max_count, ";
  const std::string options =
      "float class_weight, float box_weight, float giou_weight, str kind, float alpha, float gamma, "
      "float class_epsilon=1e-8, float giou_floor=0.0, float giou_epsilon=0.0) -> Tensor";
  m.def(("matching_cost" + arguments + options).c_str());
  m.def(("match" + arguments + "SymInt groups, " + options).c_str());
}

#if !defined(DETR_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, CPU, m) {
  m.impl("matching_cost", TORCH_BOX(&detr::ops::matching_cost));
  m.impl("match", TORCH_BOX(&detr::ops::match));
}
#endif

#if defined(DETR_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, DETR_CUDA_KEY, m) {
  m.impl("matching_cost", TORCH_BOX(&detr::ops::matching_cost_cuda));
  m.impl("match", TORCH_BOX(&detr::ops::match_cuda));
}
#endif
