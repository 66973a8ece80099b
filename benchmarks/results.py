"""Rows of measurements: one CSV for each machine, only ever appended to."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider in one benchmark; rows of one run have the same date."""

    case: str
    provider: str
    axis: str
    value: str
    median_us: float
    p20_us: float
    p80_us: float
    peak_mb: float | None
    device: str
    torch: str
    triton: str
    commit: str
    date: str  # UTC


COLUMNS = tuple(field.name for field in fields(Row))


def append(rows: Iterable[Row], path: Path) -> None:
    """Adds rows to a CSV, which is begun if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        for row in rows:
            values = asdict(row).values()
            writer.writerow(["" if x is None else f"{x:.4g}" if isinstance(x, float) else x for x in values])


def read(paths: Sequence[Path]) -> list[Row]:
    """All rows of some CSV files.

    Raises:
        ValueError: a file has other columns.
    """
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{path}: columns must be {', '.join(COLUMNS)}, got {reader.fieldnames}")
            rows += [_row(record) for record in reader]
    return rows


def latest(rows: Iterable[Row], commit: str | None = None) -> list[Row]:
    """Of every case, value and device only the rows of its last run, without a revision that was timed beside it.

    With `commit` the last run of that commit.
    """
    last: dict[tuple[str, str, str], Row] = {}
    chosen = [row for row in rows if commit is None or row.commit == commit]
    for row in chosen:
        key = (row.case, row.value, row.device)
        if key not in last or row.date > last[key].date:
            last[key] = row  # the first row of a run is of its own commit
    firsts = [(row, last[row.case, row.value, row.device]) for row in chosen]
    return [row for row, first in firsts if (row.date, row.commit) == (first.date, first.commit)]


def _row(record: dict[str, str]) -> Row:
    numbers = {name: float(record[name]) for name in ("median_us", "p20_us", "p80_us")}
    peak = float(record["peak_mb"]) if record["peak_mb"] else None
    texts = {name: record[name] for name in COLUMNS if name not in numbers and name != "peak_mb"}
    return Row(**texts, **numbers, peak_mb=peak)  # type: ignore[arg-type]
