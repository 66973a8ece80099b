"""Figures of measured times: ``python -m benchmarks.plot FOLDER``.

``--profile NAME=FILE`` also draws the parts of a training step, from tables that ``detr-fast train --profile`` wrote.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import OURS
from benchmarks.results import FOLDER, Row, latest, read
from benchmarks.tables import duration

# Colours that stay apart for colour-blind readers (Okabe and Ito), with markers; ours is always the first.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "osD^vPX"
_COLUMNS = 3  # panels beside each other: more would not be readable at the width of a page
_ADAPTED = "loss and gradient, "
_THEIRS = ("transformers", "rfdetr", "definition")  # what a code base's own loss is: the first that was timed
_AGAINST = (
    ("against the package's own code", _COLOURS[0]),
    ("against plain PyTorch and SciPy of the same loss", _COLOURS[4]),
)
_PARTS = ("data", "backbone", "transformer", "rest of forward", "loss", "backward", "optimizer")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the figures are written")
    parser.add_argument("--results", type=Path, nargs="+", help="CSV files (default: the first of benchmarks/results)")
    parser.add_argument("--profile", nargs="+", metavar="NAME=FILE", default=[], help="tables of the parts of a step")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args(arguments)
    rows = latest(read(options.results or sorted(FOLDER.glob("*.csv"))[:1]))
    devices = sorted({row.device for row in rows})
    if len(devices) > 1:
        parser.error(f"rows must be of one machine, got {'; '.join(devices)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    figures = {name: draw(rows) for name, draw in FIGURES.items()}
    if options.profile:
        figures["step"] = parts_of_steps(dict(entry.split("=", 1) for entry in options.profile))
    for name, figure in figures.items():
        if figure is not None:
            path = options.folder / f"{name}.{options.format}"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            print(path)


def assignment(rows: Sequence[Row]) -> Figure | None:
    return _panels([row for row in rows if row.case.startswith("assign,")])


def matching(rows: Sequence[Row]) -> Figure | None:
    return _panels([row for row in rows if row.case == "matcher"])


def criterion(rows: Sequence[Row]) -> Figure | None:
    return _panels([row for row in rows if row.case.startswith("criterion")])


def adapters(rows: Sequence[Row]) -> Figure | None:
    """Code bases that were timed at several sizes."""
    own = [row for row in rows if row.case.startswith(_ADAPTED)]
    sizes: dict[str, set[str]] = {}
    for row in own:
        sizes.setdefault(row.case, set()).add(row.value)
    return _panels([row for row in own if len(sizes[row.case]) > 1])


def overview(rows: Sequence[Row]) -> Figure | None:
    """How many times as fast each code base's loss becomes, at the first size that was timed."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.case.startswith(_ADAPTED):
            own = found.setdefault(row.case.removeprefix(_ADAPTED), {})
            if not own or next(iter(own.values())).value == row.value:
                own[row.provider] = row
    pairs = {name: (own[OURS], theirs) for name, own in found.items() if (theirs := _theirs(own)) and OURS in own}
    if not pairs:
        return None
    ordered = sorted(pairs, key=lambda name: _ratio(*pairs[name]))
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.32 * len(ordered)), layout="constrained")
    for place, name in enumerate(ordered):
        ours, theirs = pairs[name]
        label, colour = _AGAINST[theirs.provider == "definition"]
        axis.barh(place, _ratio(ours, theirs), color=colour, height=0.66, label=label)
        times = f"{_ratio(ours, theirs):.1f}x   {duration(theirs.median_us)} to {duration(ours.median_us)}"
        axis.text(_ratio(ours, theirs), place, f"  {times}", va="center", fontsize=9)
    axis.set_yticks(range(len(ordered)), [f"{name}, {pairs[name][0].value}" for name in ordered], fontsize=9)
    axis.axvline(1, color="0.2", linestyle="--", linewidth=1)
    axis.text(1, len(ordered) - 0.5, " 1x: no gain", fontsize=8, color="0.2", va="bottom")
    axis.set_ylim(-0.6, len(ordered) + 0.1)
    axis.set_xlim(0, 1.5 * max(_ratio(*pair) for pair in pairs.values()))
    axis.set_xlabel("speed-up of the loss with its gradient (times)")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    labelled = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(labelled.values(), labelled, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    _sign(figure, next(iter(pairs.values()))[0], f"{next(iter(pairs.values()))[0].axis} of an image; same numbers; ")
    return figure


def parts_of_steps(files: Mapping[str, str]) -> Figure:
    """One bar a table, of the device's time where there is a device."""
    steps = {name: parts_of_table(Path(file).read_text()) for name, file in files.items()}
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.5 * len(steps)), layout="constrained")
    colours = ("#999999", *_COLOURS[:6])
    for place, (milliseconds, _) in enumerate(steps.values()):
        left, total = 0.0, sum(milliseconds.values())
        for part, colour in zip(_PARTS, colours, strict=True):
            width = milliseconds[part]
            label = part if place == 0 else None
            axis.barh(place, width, left=left, color=colour, edgecolor="white", label=label)
            if width > 0.06 * total:
                ink = "white" if colour == _COLOURS[0] else "black"
                axis.text(left + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=8, color=ink)
            left += width
        axis.text(left, place, f"  {left:.3g} ms", va="center", fontsize=9)
    kinds = sorted({kind for _, kind in steps.values()})
    axis.set_yticks(range(len(steps)), list(steps))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(sum(parts.values()) for parts, _ in steps.values()))
    axis.set_xlabel(f"{' or '.join(kinds)} time of a training step, ms")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(_PARTS), frameon=False, fontsize=8)
    return figure


def parts_of_table(text: str) -> tuple[dict[str, float], str]:
    """Milliseconds of each of _PARTS, and whose they are: "device" if anything ran there, else "host".

    Raises:
        ValueError: it is no table of the profiler.
    """
    found = {
        row[1].strip(): (float(row[2]), float(row[3]))
        for row in re.finditer(r"^( *\w+) +([\d.]+) +([\d.]+) ", text, re.MULTILINE)
    }
    missing = {"data", "forward", "backbone", "transformer", "loss", "backward", "optimizer"} - found.keys()
    if missing:
        raise ValueError(f"plot: the table of a profile must have the parts {', '.join(sorted(missing))}")
    column = int(any(device > 0 for _, device in found.values()))
    times = {name: row[column] for name, row in found.items()}
    times["rest of forward"] = max(0.0, times["forward"] - times["backbone"] - times["transformer"])
    return {part: times[part] for part in _PARTS}, ("host", "device")[column]


FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "overview": overview,
    "assignment": assignment,
    "matching": matching,
    "criterion": criterion,
    "adapters": adapters,
}


def _theirs(rows: Mapping[str, Row]) -> Row | None:
    return next((rows[name] for name in _THEIRS if name in rows), None)


def _ratio(ours: Row, theirs: Row) -> float:
    return theirs.median_us / ours.median_us


def _panels(rows: Sequence[Row]) -> Figure | None:
    """One panel a case with time over size for each provider; None if there is nothing to draw."""
    cases = list(dict.fromkeys(row.case for row in rows))
    if not cases:
        return None
    columns = min(_COLUMNS, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(max(6, 1.2 + 3.6 * columns), 3.6 * lines),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    providers = list(dict.fromkeys([OURS, *(row.provider for row in rows)]))
    for axis, case in zip(axes.flat, cases, strict=False):
        _panel(axis, [row for row in rows if row.case == case], providers)
        axis.set_title(case.removeprefix(_ADAPTED), fontsize=10)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("median time, ms (logarithmic)")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    ordered = [name for name in providers if name in handles]
    across = 2 if columns == 1 else 4
    shown = [handles[name] for name in ordered]
    figure.legend(shown, ordered, loc="outside upper center", ncols=across, frameon=False, fontsize=9)
    _sign(figure, rows[0], "bars: 20th to 80th percentile; ")
    return figure


def _sign(figure: Figure, row: Row, more: str = "") -> None:
    text = f"{more}{row.device}; PyTorch {row.torch}; commit {row.commit}, {row.date[:10]}"
    figure.supxlabel(text, fontsize=7, color="0.4")


def _panel(axis: Axes, rows: Sequence[Row], providers: Sequence[str]) -> None:
    values = sorted(dict.fromkeys(row.value for row in rows), key=_volume)
    for number, provider in enumerate(providers):
        own = sorted((row for row in rows if row.provider == provider), key=lambda row: _volume(row.value))
        if not own:
            continue
        places = [values.index(row.value) for row in own]
        medians = [row.median_us / 1e3 for row in own]
        below = [(row.median_us - row.p20_us) / 1e3 for row in own]
        above = [(row.p80_us - row.median_us) / 1e3 for row in own]
        axis.errorbar(
            places,
            medians,
            yerr=(below, above),
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            capsize=2,
            linewidth=2.2 if provider == OURS else 1.2,
            color=_COLOURS[number % len(_COLOURS)],
            label=provider,
        )
    axis.set_yscale("log")
    axis.set_xticks(range(len(values)), values, fontsize=9)
    axis.set_xlim(-0.3, len(values) - 0.7)
    axis.set_xlabel(rows[0].axis)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _volume(value: str) -> int:
    """The product of the numbers in "4x100x7", by which sizes are ordered."""
    return math.prod(map(int, re.findall(r"\d+", value)))


if __name__ == "__main__":
    main()
