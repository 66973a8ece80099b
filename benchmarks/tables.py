"""Writes measured numbers into Markdown: ``python -m benchmarks.tables README.md``.

Between ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark -->`` stands the table of the last run of the cases whose name
begins with NAME; ``NAME@MACHINE`` takes another file of benchmarks/results than the first.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.harness import OURS
from benchmarks.results import FOLDER, Row, latest, read

_BLOCK = re.compile(
    r"(<!-- benchmark:(?P<name>[^@\n]+?)(@(?P<machine>[^\n]+?))? -->\n).*?(<!-- /benchmark -->)", re.DOTALL
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of CSV files (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is not up to date")
    options = parser.parse_args(arguments)
    before = options.document.read_text()
    try:
        after = filled(before, options.results)
    except ValueError as error:
        sys.exit(f"{options.document}: {error}")
    if options.check and after != before:
        sys.exit(f"{options.document}: tables differ from {options.results}; run python -m benchmarks.tables")
    if after != before:
        options.document.write_text(after)


def filled(document: str, folder: Path) -> str:
    """The document with its tables made from the CSV files of a folder.

    Raises:
        ValueError: a table's machine or cases have not been measured.
    """

    def block(found: re.Match[str]) -> str:
        files = sorted(folder.glob(f"{found['machine'] or '*'}.csv"))
        if not files:
            raise ValueError(f"no results of {found['machine'] or 'any machine'} in {folder}")
        rows = [row for row in latest(read(files[:1])) if row.case.startswith(found["name"])]
        if not rows:
            raise ValueError(f"{files[0]}: no case begins with {found['name']!r}")
        return f"{found[1]}{table(rows)}\n{found[5]}"

    return _BLOCK.sub(block, document)


def table(rows: Iterable[Row]) -> str:
    """One line a case and value; our time, and how many times as long the others take."""
    by_place: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_place.setdefault((row.case, row.value), {})[row.provider] = row
    others = list(dict.fromkeys(name for found in by_place.values() for name in found if name != OURS))
    first = next(iter(next(iter(by_place.values())).values()))
    lines = [f"| | {first.axis} | {OURS} | {' | '.join(others)} |", "|---|---|" + "---:|" * (1 + len(others))]
    for (case, value), found in by_place.items():
        ours = found[OURS]
        factors = [_factor(found[name], ours) if name in found else "" for name in others]
        lines.append(f"| {case} | {value} | {duration(ours.median_us)} | {' | '.join(factors)} |")
    lines += ["", f"{first.device}; PyTorch {first.torch}; commit {first.commit}, {first.date[:10]}."]
    return "\n".join(lines)


def duration(microseconds: float) -> str:
    """Three digits with the unit that fits: "4.21 ms"."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= size:
            return f"{microseconds / size:.3g} {unit}"
    return f"{microseconds:.3g} us"


def _factor(other: Row, ours: Row) -> str:
    ratio = other.median_us / ours.median_us
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


if __name__ == "__main__":
    main()
