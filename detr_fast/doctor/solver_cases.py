"""Assignment problems for the solvers of SciPy, lap and torch-linear-assignment. No two totals are equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from detr_fast.doctor.code_bases import Case, Result

TARGETS, QUERIES, PROBLEMS = 100, 300, 12  # PROBLEMS of six layers and two images


def cases(package: str, device: torch.device) -> Mapping[str, Callable[[], Case]]:
    known = {
        "scipy": (f"linear_sum_assignment {TARGETS} x {QUERIES}", _scipy),
        "lap": (f"lapjv {TARGETS} x {QUERIES}", _lap),
        "torch_linear_assignment": (
            f"batch_linear_assignment {PROBLEMS} x {TARGETS} x {QUERIES}",
            lambda: _torch_linear_assignment(device),
        ),
    }
    return dict([known[package]])


def _cost() -> np.ndarray:
    return np.random.default_rng(0).random((TARGETS, QUERIES))


def _scipy() -> Case:
    from scipy.optimize import linear_sum_assignment as theirs

    from detr_fast.integrations.solvers import linear_sum_assignment as ours

    cost = _cost()
    return Case.of_functions(
        lambda: Result(pairs=theirs(cost)),
        lambda: Result(pairs=ours(cost)),
    )


def _lap() -> Case:
    from lap import lapjv as theirs

    from detr_fast.integrations.solvers import lapjv as ours

    cost = _cost()
    return Case.of_functions(
        lambda: Result(pairs=theirs(cost, extend_cost=True)[1:]),
        lambda: Result(pairs=ours(cost, extend_cost=True)[1:]),
    )


def _torch_linear_assignment(device: torch.device) -> Case:
    from torch_linear_assignment import batch_linear_assignment as theirs

    from detr_fast.integrations.solvers import batch_linear_assignment as ours

    cost = torch.rand(PROBLEMS, TARGETS, QUERIES, generator=torch.Generator().manual_seed(0)).to(device)
    return Case.of_functions(
        lambda: Result(pairs=[theirs(cost)]),
        lambda: Result(pairs=[ours(cost)]),
        has_operators=True,
    )
