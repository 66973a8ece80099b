"""Supported packages that are installed here: the same computation before and after, its numbers, time and waits."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_fast.doctor.activity import Activity, activity_of, milliseconds
from detr_fast.doctor.machine import version_of
from detr_fast.doctor.report import first_line
from detr_fast.integrations.mode import Mode
from detr_fast.integrations.patching import CODE_BASES, patch

# Importable name -> its distributions, and the module here with cases(device) -> Iterator[Case].
PACKAGES = {
    "transformers": (("transformers",), "detr_fast.doctor.transformers_cases"),
    "rfdetr": (("rfdetr",), "detr_fast.doctor.rfdetr_cases"),
    "scipy": (("scipy",), "detr_fast.doctor.solver_cases"),
    "lap": (("lapx", "lap"), "detr_fast.doctor.solver_cases"),
    "torch_linear_assignment": (("torch-linear-assignment",), "detr_fast.doctor.solver_cases"),
}

SECONDS = 0.5  # for which a case is timed
TOLERANCE = 1e-5  # of losses, and of the largest gradient; float32 sums in another order
_SMALL = 0.1  # a loss below is compared as if it were this large


class Result(NamedTuple):
    """What a computation returns: losses by name and gradients of all inputs, or pairs."""

    losses: Mapping[str, Tensor] = {}
    gradients: Sequence[Tensor] = ()
    pairs: Sequence[Any] = ()  # arrays or tensors


@dataclass(frozen=True)
class Case:
    """One computation by a package and by this one: two functions, or one function and a patch."""

    theirs: Callable[[], Result]
    ours: Callable[[], Result]
    around: Callable[[Mode], AbstractContextManager[object]]  # in which `ours` is called
    has_operators: bool = True  # of PyTorch, which can be counted

    @classmethod
    def patched(cls, package: str, run: Callable[[], Result]) -> Case:
        return cls(run, run, lambda mode: patch(package, mode))

    @classmethod
    def of_functions(
        cls, theirs: Callable[[], Result], ours: Callable[[], Result], has_operators: bool = False
    ) -> Case:
        return cls(theirs, ours, lambda mode: contextlib.nullcontext(), has_operators)


@dataclass
class Row:
    """What was found of a case. Without times and counts where they were not asked for or cannot be taken."""

    case: str
    ok: bool = True
    message: str | None = None
    loss_difference: float | None = None
    gradient_difference: float | None = None
    same_pairs: bool | None = None
    milliseconds: tuple[float, float] | None = None  # before, after
    activity: tuple[Activity, Activity] | None = None

    @property
    def compared(self) -> bool:
        return not self.ok or self.loss_difference is not None or self.same_pairs is not None


@dataclass
class Package:
    """An installed package that is supported in some versions."""

    name: str
    version: str
    supported: bool
    message: str | None = None  # why it is not supported
    rows: list[Row] = field(default_factory=list)


def absent() -> list[str]:
    """Names of supported packages that are not installed."""
    return [name for name in PACKAGES if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def examine(device: torch.device, quick: bool) -> Iterator[Package]:
    """Every package that is installed; `quick` leaves out times and counts.

    Patches are undone and the random numbers of the process are left as they were.
    """
    for name, (distributions, module) in PACKAGES.items():
        if not _is_installed(name):
            continue
        version = next(filter(None, map(version_of, distributions)), "unknown version")
        devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
        generators = torch.random.fork_rng(devices=devices)
        with generators, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages themselves
            refusal = _refusal(name)
            package = Package(name, version, refusal is None, refusal)
            if package.supported:
                package.rows = _rows(name, importlib.import_module(module).cases(name, device), device, quick)
        yield package


def _refusal(name: str) -> str | None:
    """Why a package cannot be used with this one, or None."""
    try:
        if name in CODE_BASES:
            with patch(name):
                return None
        importlib.import_module(name)
    except Exception as error:  # of a package that is broken, anything
        return first_line(error)
    return None


def _rows(name: str, cases: Mapping[str, Callable[[], Case]], device: torch.device, quick: bool) -> list[Row]:
    rows = []
    for case_name, build in cases.items():
        row = Row(case_name)
        rows.append(row)
        try:
            case = build()
            expected = case.theirs()
        except Exception as error:
            row.message = f"not compared, {name} itself fails: {first_line(error)}"
            continue
        try:
            with case.around("compat"):
                found = case.ours()
            _compare(row, expected, found)
            if row.ok and not quick:
                _measure(row, case, device)
        except Exception as error:
            row.ok, row.message = False, first_line(error)
    return rows


def _compare(row: Row, expected: Result, found: Result) -> None:
    if list(expected.losses) != list(found.losses):
        raise ValueError(f"losses must be {list(expected.losses)}, got {list(found.losses)}")
    problems = []
    if expected.losses:
        of_loss = {key: _difference(value, found.losses[key]) for key, value in expected.losses.items()}
        worst = max(of_loss, key=lambda key: of_loss[key])
        row.loss_difference = of_loss[worst]
        if not of_loss[worst] <= TOLERANCE:
            problems.append(f"{worst} differs by {of_loss[worst]:.2g}")
    if expected.gradients:
        largest = max(float(x.abs().max()) for x in expected.gradients)
        pairs = zip(found.gradients, expected.gradients, strict=True)
        difference = max(_maximum((own - other).abs()) for own, other in pairs)
        row.gradient_difference = difference / largest
        if not difference <= TOLERANCE * largest:
            problems.append(f"gradients differ by {difference / largest:.2g} of the largest")
    if expected.pairs:
        row.same_pairs = [x.tolist() for x in expected.pairs] == [x.tolist() for x in found.pairs]
        problems += [] if row.same_pairs else ["other pairs"]
    row.ok, row.message = not problems, "; ".join(problems) or None


def _difference(expected: Tensor, found: Tensor) -> float:
    """Relative; infinity if one is not a number."""
    wanted, got = float(expected), float(found)
    difference = abs(got - wanted) / max(abs(wanted), _SMALL)
    return difference if difference == difference else float("inf")


def _maximum(x: Tensor) -> float:
    largest = float(x.max()) if x.numel() else 0.0
    return largest if largest == largest else float("inf")


def _measure(row: Row, case: Case, device: torch.device) -> None:
    """As it is used by default: in mode "stable"."""

    def default() -> AbstractContextManager[object]:
        return case.around("stable")

    with default():
        case.ours()  # the first call in this mode
    calls = [(case.theirs, contextlib.nullcontext), (case.ours, default)]
    before, after = milliseconds(calls, device, SECONDS)
    row.milliseconds = before, after
    if case.has_operators:
        theirs = activity_of(case.theirs, device)
        with default():
            row.activity = theirs, activity_of(case.ours, device)
