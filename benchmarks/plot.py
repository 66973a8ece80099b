"""Figures of measured times: ``python -m benchmarks.plot FOLDER``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import OURS
from benchmarks.results import FOLDER, Row, latest, read

# Colours that stay apart for colour-blind readers (Okabe and Ito); ours is always the first.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the figures are written")
    parser.add_argument("--results", type=Path, nargs="+", help="CSV files (default: the first of benchmarks/results)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args(arguments)
    rows = latest(read(options.results or sorted(FOLDER.glob("*.csv"))[:1]))
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = options.folder / f"{name}.{options.format}"
        if draw(rows, path):
            print(path)


def assignment(rows: Sequence[Row], path: Path) -> bool:
    return _panels([row for row in rows if row.case.startswith("assign,")], path)


def matching(rows: Sequence[Row], path: Path) -> bool:
    return _panels([row for row in rows if row.case == "matcher"], path)


def criterion(rows: Sequence[Row], path: Path) -> bool:
    return _panels([row for row in rows if row.case.startswith("criterion")], path)


FIGURES: dict[str, Callable[[Sequence[Row], Path], bool]] = {
    "assignment": assignment,
    "matching": matching,
    "criterion": criterion,
}


def _panels(rows: Sequence[Row], path: Path) -> bool:
    """One panel a case with time over size for each provider; False if there is nothing to draw."""
    cases = list(dict.fromkeys(row.case for row in rows))
    if not cases:
        return False
    figure, axes = plt.subplots(
        1, len(cases), figsize=(1.2 + 3.6 * len(cases), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    providers = list(dict.fromkeys([OURS, *(row.provider for row in rows)]))
    for axis, case in zip(axes[0], cases, strict=True):
        _panel(axis, [row for row in rows if row.case == case], providers)
        axis.set_title(case, fontsize=10)
    axes[0][0].set_ylabel("median time, ms")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.supxlabel(
        f"{rows[0].device}; bars: 20th to 80th percentile; commit {rows[0].commit}", fontsize=7, color="0.4"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def _panel(axis: Axes, rows: Sequence[Row], providers: Sequence[str]) -> None:
    values = list(dict.fromkeys(row.value for row in rows))
    for number, provider in enumerate(providers):
        own = [row for row in rows if row.provider == provider]
        places = [values.index(row.value) for row in own]
        medians = [row.median_us / 1e3 for row in own]
        below = [(row.median_us - row.p20_us) / 1e3 for row in own]
        above = [(row.p80_us - row.median_us) / 1e3 for row in own]
        axis.errorbar(
            places,
            medians,
            yerr=(below, above),
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=2.2 if provider == OURS else 1.2,
            color=_COLOURS[number % len(_COLOURS)],
            label=provider,
        )
    axis.set_yscale("log")
    axis.set_xticks(range(len(values)), values)
    axis.set_xlim(-0.3, len(values) - 0.7)
    axis.set_xlabel(rows[0].axis)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
