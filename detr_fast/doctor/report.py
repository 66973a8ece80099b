"""What the examination found, as lines to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they need the native library, whose absence is reported, too
    from detr_fast.doctor.code_bases import Package, Row
    from detr_fast.doctor.self_test import Check

_HEADER = ("package", "case", "losses", "gradients", "ms before", "after", "faster", "waits", "launches")


def first_line(error: BaseException) -> str:
    """Of what may be a page, as PyTorch's messages of missing kernels are."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}{'...' if len(lines[0]) > 200 else ''}"


def pairs(title: str, found: Mapping[str, str]) -> Iterator[str]:
    yield title
    width = max(map(len, found)) + 2
    for name, text in found.items():
        yield f"  {name:{width}}{text}"


def self_test(checks: Sequence[Check]) -> Iterator[str]:
    """A line for each op, a column for each device, and below it what failed."""
    devices = list(dict.fromkeys(check.device for check in checks))
    of = {(check.name, check.device): check for check in checks}
    names = list(dict.fromkeys(check.name for check in checks))
    rows = [["self-test, error beside the definition", *devices]]
    rows += [[f"  {name}", *(_cell(of.get((name, device))) for device in devices)] for name in names]
    yield from table(rows)
    yield from (f"  {failure(check)}" for check in checks if not check.ok)


def failure(check: Check) -> str:
    return f"FAILED  {check.name} on {check.device}: {check.message}"


def _cell(check: Check | None) -> str:
    if check is None:
        return "-"
    return "FAILED" if not check.ok else f"ok  {check.error:.1e}" if check.error else "ok  exact"


def code_bases(
    packages: Sequence[Package], absent: Sequence[str], device: str, counted: bool, quick: bool
) -> Iterator[str]:
    """One table of all cases; below it what failed, what is not supported, and what the numbers are."""
    yield f"code bases on {device}, before and after"
    rows: list[Sequence[str]] = [_HEADER[:4] if quick else _HEADER]
    for package in packages:
        lead = f"{package.name} {package.version}"
        rows += [[lead, "not supported"]] * (not package.supported)
        rows += [[lead, row.case, *_numbers(row)[: 2 if quick else None]] for row in package.rows]
    yield from (f"  {line}" for line in table(rows))
    for package in packages:
        if not package.supported:
            yield f"  not supported  {package.name} {package.version}: {package.message}"
        for row in package.rows:
            if row.message:
                yield f"  {'note  ' if row.ok else 'FAILED'}  {package.name}, {row.case}: {row.message}"
    if absent:
        yield f"  not installed: {', '.join(absent)}"
    if any(package.rows for package in packages):
        yield from _footnotes(counted, quick)


def _footnotes(counted: bool, quick: bool) -> Iterator[str]:
    yield "  losses, gradients: largest relative difference in mode compat, of the loss, of the largest gradient"
    if quick:
        return
    yield "  times (medians), waits for the device and launches: of one call with gradients, in the default mode stable"
    if counted:
        yield "  waits, launches: recorded by PyTorch's profiler"
    else:
        yield "  waits, launches: estimated for a GPU by operators, without copies to the host, as there is none here"


def _numbers(row: Row) -> list[str]:
    if row.same_pairs is not None:
        cells = ["same pairs" if row.same_pairs else "OTHER PAIRS", "-"]
    else:
        cells = [_scientific(row.loss_difference), _scientific(row.gradient_difference)]
    if row.milliseconds is None:
        return [*cells, *["-"] * 5]
    before, after = row.milliseconds
    cells += [f"{before:.3g}", f"{after:.3g}", f"{before / after:.1f}x"]
    if row.activity is None:
        return [*cells, "-", "-"]
    theirs, ours = row.activity
    return [*cells, f"{theirs.waits} -> {ours.waits}", f"{theirs.launches} -> {ours.launches}"]


def _scientific(number: float | None) -> str:
    return "-" if number is None else f"{number:.1e}"


def table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Columns of equal width, apart by two spaces; rows may be short."""
    rows = list(rows)
    count = max(map(len, rows))
    widths = [max((len(row[column]) for row in rows if column < len(row)), default=0) for column in range(count)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip()
