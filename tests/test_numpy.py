"""The NumPy face: SciPy's results and errors, every real type, and no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize

from detr_fast.numpy import linear_sum_assignment

REAL = ["bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"]


def assert_as_scipy(cost: np.ndarray, maximize: bool = False) -> None:
    rows, columns = linear_sum_assignment(cost, maximize)
    expected = scipy.optimize.linear_sum_assignment(cost, maximize)
    assert rows.dtype == columns.dtype == np.int64
    assert rows.tolist() == expected[0].tolist() or len(rows) < len(cost)
    assert len(set(columns.tolist())) == len(columns) == len(expected[1])
    values = np.asarray(cost).astype(np.float64)
    ours, theirs = values[rows, columns].sum(), values[expected].sum()
    assert abs(ours - theirs) <= 4 * len(rows) * np.finfo(np.float64).eps * np.abs(values[np.isfinite(values)]).max(
        initial=0
    )


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", REAL)
def test_every_real_type(dtype: str, maximize: bool) -> None:
    random = np.random.default_rng(0)
    for shape in [(0, 0), (0, 3), (3, 0), (1, 1), (4, 9), (9, 4), (30, 30), (100, 7)]:
        assert_as_scipy((random.random(shape) * 100).astype(dtype), maximize)


def test_long_double_is_solved_as_float64() -> None:
    cost = np.random.default_rng(0).random((5, 8))
    assert linear_sum_assignment(cost.astype("longdouble"))[1].tolist() == linear_sum_assignment(cost)[1].tolist()


def test_layouts_and_sequences() -> None:
    cost = np.random.default_rng(1).random((40, 60))
    for view in (cost.T, cost[::3, ::2], cost[::-1], np.asfortranarray(cost), cost.astype(">f8")):
        assert_as_scipy(view)
    assert linear_sum_assignment([[4, 1, 3], [2, 0, 5], [3, 2, 2]])[1].tolist() == [1, 0, 2]
    assert linear_sum_assignment(cost_matrix=cost, maximize=True)[1].shape == (40,)


def test_infinity_is_a_forbidden_pair() -> None:
    random = np.random.default_rng(2)
    for _ in range(100):
        cost = random.random((6, 8))
        cost[random.random(cost.shape) < 0.5] = np.inf
        try:
            scipy.optimize.linear_sum_assignment(cost)
        except ValueError as error:
            with pytest.raises(ValueError, match=str(error)):
                linear_sum_assignment(cost)
        else:
            assert_as_scipy(cost)


@pytest.mark.parametrize("large", [1e200, 1e301, 1.7e308])
def test_very_large_costs(large: float) -> None:
    cost = np.random.default_rng(3).random((5, 7)) * large
    _rows, columns = linear_sum_assignment(cost)
    expected = scipy.optimize.linear_sum_assignment(cost / 2**60)
    assert columns.tolist() == expected[1].tolist()


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(3),
        np.zeros((2, 2, 2)),
        np.array([[np.nan, 1.0]]),
        np.array([[-np.inf, 1.0]]),
        np.array([[np.inf, np.inf], [1.0, 2.0]]),
        np.array([["a", "b"]]),
        None,
    ],
    ids=["1-d", "3-d", "nan", "-inf", "infeasible", "strings", "None"],
)
def test_bad_input_raises_what_scipy_raises(bad: object) -> None:
    with pytest.raises((ValueError, TypeError)) as expected:
        scipy.optimize.linear_sum_assignment(bad)
    with pytest.raises(expected.type) as raised:
        linear_sum_assignment(bad)
    if "matrix" in str(expected.value) and expected.type is ValueError:
        assert str(raised.value).split(",")[0] == str(expected.value).split(",")[0]


def test_complex_numbers_are_refused() -> None:
    with pytest.raises((TypeError, ValueError)):
        linear_sum_assignment(np.zeros((2, 2), complex))


def test_an_error_of_the_conversion_is_passed_on() -> None:
    class Failing:
        def __array__(self, *_arguments: object, **_options: object) -> np.ndarray:
            raise RuntimeError("no array today")

    for matrix in ([[1, 2], [3]], Failing()):
        with pytest.raises(Exception, match=r"inhomogeneous|no array today") as expected:
            scipy.optimize.linear_sum_assignment(matrix)
        with pytest.raises(expected.type) as raised:
            linear_sum_assignment(matrix)
        assert str(raised.value) == str(expected.value)


def test_torch_is_not_imported() -> None:
    code = "import sys, detr_fast.numpy; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
