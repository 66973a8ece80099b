// detr_fast._numpy: scipy.optimize.linear_sum_assignment with the same signature, results and errors, without PyTorch.
// Always solved in float64, as SciPy does, so that the optimum is that of the numbers given.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include "kernels.h"

namespace py = pybind11;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kBlock = 8;  // numbers in a cache line

// A matrix in row-major order.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
};

// sign * matrix, row by row or column by column.
template <typename T>
void copy(Matrix<T> from, bool by_column, double sign, double* to) {
  if (!by_column) {
    const int64_t count = from.rows * from.columns;
    for (int64_t k = 0; k < count; ++k) to[k] = sign * double(from.data[k]);
    return;
  }
  const auto copy_block = [=](int64_t start, auto height) {
    for (int64_t j = 0; j < from.columns; ++j) {
      const T* column = from.data + start * from.columns + j;
      double* out = to + j * from.rows + start;
      for (int64_t i = 0; i < height; ++i) out[i] = sign * double(column[i * from.columns]);
    }
  };
  // Blocks of rows: every cache line is written at once.
  int64_t start = 0;
  for (; start + kBlock <= from.rows; start += kBlock) copy_block(start, std::integral_constant<int64_t, kBlock>());
  copy_block(start, from.rows - start);
}

// Refuses what SciPy refuses. Returns whether there are numbers too large to be summed.
bool has_too_large(const double* cost, int64_t count) {
  double largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (!(cost[k] > -kInfinity)) throw py::value_error("matrix contains invalid numeric entries");
    if (cost[k] < kInfinity) largest = std::max(largest, std::fabs(cost[k]));
  }
  return largest >= detr::kCostLimit<double>;
}

template <typename T>
void solve(Matrix<T> cost, bool maximize, int32_t* column_of_row) {
  const bool by_column = cost.rows > cost.columns;
  const int64_t count = cost.rows * cost.columns;
  const int64_t rows = by_column ? cost.columns : cost.rows, columns = by_column ? cost.rows : cost.columns;
  double* copied = static_cast<double*>(
      detr::cpu::scratch(detr::cpu::Scratch::kCost, count * sizeof(double) + cost.rows * sizeof(int32_t)));
  copy(cost, by_column, maximize ? -1 : 1, copied);

  int32_t* result = by_column ? reinterpret_cast<int32_t*>(copied + count) : column_of_row;
  const int32_t offsets[2] = {0, static_cast<int32_t>(rows)};
  const auto assign = [&] {
    return detr::cpu::kernels().assign_double({{1, 1, columns, rows, offsets}, 1, copied, result, nullptr, nullptr}, 0,
                                              1);
  };
  if (assign() && has_too_large(copied, count)) {
    for (int64_t k = 0; k < count; ++k) copied[k] *= 0x1p-100;  // exact
    assign();
  }
  if (!by_column) return;
  for (int64_t i = 0; i < cost.rows; ++i) column_of_row[i] = -1;
  for (int64_t j = 0; j < rows; ++j)
    if (result[j] >= 0) column_of_row[result[j]] = static_cast<int32_t>(j);
}

template <typename T>
bool is_plain(const py::object& object) {
  return py::isinstance<py::array_t<T, py::array::c_style>>(object);
}

// A matrix of float32 or float64 in row-major order, which is read in place; everything else is converted to float64.
py::array readable(const py::object& cost_matrix) {
  if (is_plain<double>(cost_matrix) || is_plain<float>(cost_matrix)) return cost_matrix;
  const py::array given(cost_matrix);
  const char kind = given.dtype().kind();
  if (kind != 'f' && kind != 'i' && kind != 'u' && kind != 'b' && given.ndim() == 2)
    throw py::type_error("linear_sum_assignment: cost_matrix must be of a real type, got " +
                         std::string(py::str(given.dtype())));
  return py::array_t<double, py::array::c_style | py::array::forcecast>(given);
}

void solve_any(const py::array& cost, bool maximize, int32_t* column_of_row) {
  const int64_t rows = cost.shape(0), columns = cost.shape(1);
  const auto run = [&] {
    if (cost.itemsize() == sizeof(double))
      return solve<double>({static_cast<const double*>(cost.data()), rows, columns}, maximize, column_of_row);
    solve<float>({static_cast<const float*>(cost.data()), rows, columns}, maximize, column_of_row);
  };
  if (rows * columns <= 4096) return run();  // the lock costs more than it would free
  py::gil_scoped_release released;
  run();
}

py::tuple linear_sum_assignment(const py::object& cost_matrix, bool maximize) {
  const py::array given = readable(cost_matrix);
  if (given.ndim() != 2)
    throw py::value_error("expected a matrix (2-D array), got a " + std::to_string(given.ndim()) + " array");
  const int64_t rows = given.shape(0), columns = given.shape(1), count = std::min(rows, columns);
  py::array_t<int64_t> row_indices(count), column_indices(count);
  if (count == 0) return py::make_tuple(std::move(row_indices), std::move(column_indices));

  int32_t few[256];
  std::unique_ptr<int32_t[]> many(rows > 256 ? new int32_t[rows] : nullptr);
  int32_t* column_of_row = many ? many.get() : few;
  solve_any(given, maximize, column_of_row);
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
  module.def("linear_sum_assignment", &linear_sum_assignment, py::arg("cost_matrix"), py::arg("maximize") = false,
             R"(linear_sum_assignment(cost_matrix, maximize=False)

Rows and columns of the assignment of least (or greatest) total cost, as scipy.optimize.linear_sum_assignment.

cost_matrix: [n, m] of any real type; +infinity (with maximize: -infinity) forbids a pair.
Returns two int64 arrays of length min(n, m), the rows ascending. The total is that of SciPy; equal optima may differ.
Raises ValueError where SciPy does, with its text; TypeError if the type is not real.)");
}
