// detr_fast._numpy: scipy.optimize.linear_sum_assignment with the same signature, results and errors, without PyTorch.
// Always solved in float64, as SciPy does, so that the optimum is that of the numbers given.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace {

struct Summary {
  bool invalid = false;  // NaN, or infinity of the sign that no assignment could afford
  double largest = 0;    // finite magnitude
};

// cost [count] as float64, negated to maximize.
Summary convert(const double* from, int64_t count, bool maximize, double* to) {
  const double sign = maximize ? -1 : 1, infinity = std::numeric_limits<double>::infinity();
  int bad = 0;
  double largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const double x = sign * from[k], size = std::fabs(x);
    bad |= !(x > -infinity);  // also true for NaN
    largest = size > largest && size < infinity ? size : largest;
    to[k] = x;
  }
  return {bad != 0, largest};
}

void solve(const double* cost, int64_t rows, int64_t columns, bool maximize, int32_t* column_of_row) {
  std::vector<double> converted(rows * columns);
  const Summary summary = convert(cost, rows * columns, maximize, converted.data());
  if (summary.invalid) throw py::value_error("matrix contains invalid numeric entries");
  // Scaling by a power of two is exact and keeps sums of the largest numbers finite.
  if (summary.largest >= detr::kCostLimit<double>)
    for (double& x : converted) x *= 0x1p-100;
  const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
  const detr::AssignmentArguments<double> arguments = {
      {1, 1, columns, rows, offsets}, converted.data(), column_of_row, nullptr, nullptr};
  detr::cpu::kernels().assign_double(arguments, 0, 1);
}

py::tuple linear_sum_assignment(const py::object& cost_matrix, bool maximize) {
  const py::array given = py::array::ensure(cost_matrix);
  if (!given) throw py::error_already_set();
  if (given.ndim() != 2)
    throw py::value_error("expected a matrix (2-D array), got a " + std::to_string(given.ndim()) + " array");
  const char kind = given.dtype().kind();
  if (kind != 'f' && kind != 'i' && kind != 'u' && kind != 'b')
    throw py::type_error("linear_sum_assignment: cost_matrix must be of a real type, got " +
                         std::string(py::str(given.dtype())));
  const auto cost = py::array_t<double, py::array::c_style | py::array::forcecast>::ensure(given);
  if (!cost) throw py::error_already_set();
  const int64_t rows = cost.shape(0), columns = cost.shape(1), count = rows < columns ? rows : columns;

  std::vector<int32_t> column_of_row(rows, -1);
  {
    py::gil_scoped_release released;
    if (count > 0) solve(cost.data(), rows, columns, maximize, column_of_row.data());
  }
  py::array_t<int64_t> row_indices(count), column_indices(count);
  int64_t *row = row_indices.mutable_data(), *column = column_indices.mutable_data(), found = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (column_of_row[i] < 0) continue;
    row[found] = i;
    column[found++] = column_of_row[i];
  }
  if (found < count) throw py::value_error("cost matrix is infeasible");
  return py::make_tuple(std::move(row_indices), std::move(column_indices));
}

}  // namespace

PYBIND11_MODULE(_numpy, module) {
  module.def("linear_sum_assignment", &linear_sum_assignment, py::arg("cost_matrix"), py::arg("maximize") = false);
}
