// The op assign.
#include <tuple>

#include "checks.h"
#include "device.h"

namespace detr::ops {
namespace {

using Assignment = std::tuple<Tensor, Tensor, Tensor>;  // query_of_target, target_price, query_price

struct AssignInputs {
  Tensor cost, offsets;
  ElementType type;
  Batch batch;
  int64_t groups;

  int64_t rows() const { return batch.targets * groups; }
  int64_t problems() const { return batch.layers * batch.images * groups; }
};

AssignInputs checked(const Tensor& cost, const Tensor& offsets, int64_t groups) {
  check_shape("assign", "cost", cost, {-1, -1, -1}, "[L, T, Q]");
  check_type("assign", "offsets", offsets, ScalarType::Int, "int32");
  const ElementType type = element_type("assign", "cost", cost.scalar_type());
  check(type == ElementType::kFloat64 || type == ElementType::kFloat32, "assign: cost must be float32 or float64, got ",
        toString(cost.scalar_type()));
  AssignInputs in = {dense(cost), dense(offsets), type, {}, groups};
  in.batch = batch_of("assign", in.offsets, cost.size(0), cost.size(2), cost.size(1));
  check_groups("assign", in.batch, groups);
  return in;
}

// Without prices the last two are empty.
template <typename T>
AssignmentArguments<T> arguments_of(const AssignInputs& in, Assignment& result) {
  auto& [query_of_target, target_price, query_price] = result;
  const bool prices = target_price.size(0) > 0;
  return {in.batch,
          in.groups,
          in.cost.template const_data_ptr<T>(),
          query_of_target.template mutable_data_ptr<int32_t>(),
          prices ? target_price.template mutable_data_ptr<T>() : nullptr,
          prices ? query_price.template mutable_data_ptr<T>() : nullptr};
}

#if !defined(DETR_EMULATED)
template <typename T>
void assign_on_host(const AssignmentArguments<T>& arguments) {
  const Batch& batch = arguments.batch;
  const int64_t problems = batch.layers * batch.images * arguments.groups;
  const double work = double(batch.layers) * batch.targets * batch.queries / std::max<int64_t>(problems, 1);
  const auto kernel = kernel_of<T>(cpu::kernels().assign_float, cpu::kernels().assign_double);
  in_parallel(problems, work, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

Assignment assign(Tensor cost, Tensor offsets, int64_t max_count, int64_t groups, bool prices) {
  const AssignInputs in = checked(cost, offsets, groups);
  const Batch& batch = in.batch;
  check_offsets("assign", batch, max_count);
  const int64_t priced = prices ? batch.layers : 0;
  Assignment result = {new_filled(in.cost, {batch.layers, in.rows()}, ScalarType::Int, -1),
                       torch::stable::new_zeros(in.cost, {priced, in.rows()}),
                       torch::stable::new_empty(in.cost, {priced, batch.images, batch.queries})};
  if (in.type == ElementType::kFloat64) {
    assign_on_host(arguments_of<double>(in, result));
  } else {
    assign_on_host(arguments_of<float>(in, result));
  }
  return result;
}
#endif

#if defined(DETR_WITH_CUDA)
Assignment assign_cuda(Tensor cost, Tensor offsets, int64_t max_count, int64_t groups, bool prices) {
  const OnDevice device(cost);
  const AssignInputs in = checked(cost, offsets, groups);
  check_device("assign", "offsets", offsets, cost, "cost");
  const Batch& batch = in.batch;
  const int64_t priced = prices ? batch.layers : 0;
  Assignment result = {torch::stable::new_empty(in.cost, {batch.layers, in.rows()}, ScalarType::Int),
                       torch::stable::new_zeros(in.cost, {priced, in.rows()}),
                       torch::stable::new_zeros(in.cost, {priced, batch.images, batch.queries})};
  if (batch.images == 0) torch::stable::fill_(std::get<0>(result), -1);
  const auto plan = cuda::assign_plan(batch, groups, max_count < 0 ? batch.targets : max_count, in.type);
  const Tensor scratch = new_bytes(in.cost, in.problems() * int64_t(plan.scratch_bytes));
  if (in.type == ElementType::kFloat64) {
    cuda::assign(arguments_of<double>(in, result), nullptr, plan, scratch.mutable_data_ptr(), device.stream());
  } else {
    cuda::assign(arguments_of<float>(in, result), nullptr, plan, scratch.mutable_data_ptr(), device.stream());
  }
  return result;
}
#endif

}  // namespace
}  // namespace detr::ops

STABLE_TORCH_LIBRARY_FRAGMENT(DETR_LIBRARY, m) {
  m.def(
      "assign(Tensor cost, Tensor offsets, SymInt max_count, SymInt groups, bool prices) -> (Tensor, Tensor, Tensor)");
}

#if !defined(DETR_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, CPU, m) { m.impl("assign", TORCH_BOX(&detr::ops::assign)); }
#endif

#if defined(DETR_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, DETR_CUDA_KEY, m) { m.impl("assign", TORCH_BOX(&detr::ops::assign_cuda)); }
#endif
