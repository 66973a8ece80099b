// The op unite.
#include "checks.h"
#include "device.h"

namespace detr::ops {
namespace {

struct UnionInputs {
  Tensor query_of_target, offsets;
  Batch batch;
};

UnionInputs checked(const Tensor& query_of_target, const Tensor& offsets, int64_t num_queries) {
  check_shape("unite", "query_of_target", query_of_target, {-1, -1}, "[S, T]");
  check_type("unite", "query_of_target", query_of_target, ScalarType::Int, "int32");
  check_type("unite", "offsets", offsets, ScalarType::Int, "int32");
  check(num_queries >= 0, "unite: num_queries must not be negative, got ", num_queries);
  const int64_t sets = query_of_target.size(0), targets = query_of_target.size(1);
  check(sets < INT32_MAX && sets * targets < INT32_MAX,
        "unite: query_of_target must have at most 2^31 - 2 sets and entries, got ", shape_of(query_of_target));
  UnionInputs in = {dense(query_of_target), dense(offsets), {}};
  in.batch = batch_of("unite", in.offsets, sets, num_queries, targets);
  return in;
}

UnionArguments arguments_of(const UnionInputs& in, Tensor& united) {
  return {in.batch, in.query_of_target.const_data_ptr<int32_t>(), united.mutable_data_ptr<int32_t>()};
}

#if !defined(DETR_EMULATED)
void check_queries(const Batch& batch, const int32_t* query_of_target) {
  const auto is_out_of_range = [&](int32_t query) { return uint32_t(query) + 1 > uint32_t(batch.queries); };
  const int64_t end = batch.offsets[batch.images];
  for (int64_t s = 0; s < batch.layers; ++s) {
    const int32_t* row = query_of_target + s * batch.targets;
    bool found = false;
    for (int64_t t = 0; t < end; ++t) found |= is_out_of_range(row[t]);
    if (!found) continue;
    const int64_t t = std::find_if(row, row + end, is_out_of_range) - row;
    const int64_t image = std::upper_bound(batch.offsets, batch.offsets + batch.images, t) - batch.offsets - 1;
    check(false, "unite: query_of_target must be in [-1, ", batch.queries, "), got ", row[t], " in set ", s,
          ", target ", t - batch.offsets[image], " of image ", image);
  }
}

Tensor unite(Tensor query_of_target, Tensor offsets, int64_t num_queries) {
  const UnionInputs in = checked(query_of_target, offsets, num_queries);
  const Batch& batch = in.batch;
  check_offsets("unite", batch, -1);
  Tensor united = torch::stable::new_empty(in.query_of_target, {batch.layers, batch.targets});
  const UnionArguments arguments = arguments_of(in, united);
  check_queries(batch, arguments.query_of_target);
  const double work = double(batch.layers) * batch.targets / std::max<int64_t>(batch.images, 1) + batch.queries;
  in_parallel(batch.images, work, [&](int64_t begin, int64_t end) { cpu::kernels().unite(arguments, begin, end); });
  const int64_t used = batch.offsets[batch.images];
  for (int64_t s = 0; s < batch.layers; ++s)
    std::fill_n(arguments.united + s * batch.targets + used, batch.targets - used, -1);
  return united;
}
#endif

#if defined(DETR_WITH_CUDA)
Tensor unite_cuda(Tensor query_of_target, Tensor offsets, int64_t num_queries) {
  const OnDevice device(query_of_target);
  const UnionInputs in = checked(query_of_target, offsets, num_queries);
  check_device("unite", "offsets", offsets, query_of_target, "query_of_target");
  Tensor united = torch::stable::new_empty(in.query_of_target, {in.batch.layers, in.batch.targets});
  if (in.batch.images == 0) torch::stable::fill_(united, -1);
  cuda::unite(arguments_of(in, united), device.stream());
  return united;
}
#endif

}  // namespace
}  // namespace detr::ops

STABLE_TORCH_LIBRARY_FRAGMENT(DETR_LIBRARY, m) {
  m.def("unite(Tensor query_of_target, Tensor offsets, SymInt num_queries) -> Tensor");
}

#if !defined(DETR_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, CPU, m) { m.impl("unite", TORCH_BOX(&detr::ops::unite)); }
#endif

#if defined(DETR_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(DETR_LIBRARY, DETR_CUDA_KEY, m) { m.impl("unite", TORCH_BOX(&detr::ops::unite_cuda)); }
#endif
