"""Times our code beside others': ``python -m benchmarks.run assignment criterion attention``.

``ptx`` and ``triton`` time nothing: they print what the compilers made of the kernels, without a GPU.

Every provider is checked against the definition before it is timed. Medians and ratios are printed with the bars they
should reach, and appended to the CSV of this machine in benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from itertools import count
from pathlib import Path

import torch

from benchmarks import machine, ptx, results, sass
from benchmarks.harness import OURS, Benchmark, LocalSampler, Options, Sampler, Smaller, Timing, measure
from benchmarks.other_revision import OtherRevision

TIMED = (
    *("assignment", "matching", "criterion", "adapters"),
    *("attention", "transformer", "model", "train_step", "input_pipeline"),
)
SUITES = (*TIMED, "ptx", "triton")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if "ptx" in options.suites:
        found = ptx.kernels(ptx.library())
        print(ptx.report(found))
        if found and sass.nvdisasm():
            for name, counts in sass.scans(ptx.library(), 90).items():
                print(f"{name}, sm_90: {' / '.join(map(str, counts))} instructions of a scan")
        if options.update:
            ptx.record(found)
    if "triton" in options.suites:
        from benchmarks import triton_kernels  # Triton need not be there for the others

        triton_kernels.print_report(options.update)
    suites = [suite for suite in options.suites if suite in TIMED]
    if not suites:
        return
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    settings = Options(device, options.quick)
    name = machine.device_name(device)
    output = options.output or results.FOLDER / f"{machine.slug(name)}.csv"
    run = Run(settings, options.threads, name, output)
    with contextlib.ExitStack() as stack:
        if options.against:
            run.other = stack.enter_context(OtherRevision(options.against, settings, options.threads))
        for suite in suites:
            for index, benchmark in enumerate(benchmarks_of(suite, settings)):
                if re.search(options.only, f"{benchmark.case} {benchmark.value}"):
                    run.time(suite, index, benchmark)
    run.summarize()


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    found.add_argument("suites", nargs="+", choices=SUITES, metavar="SUITE", help=", ".join(SUITES))
    found.add_argument(
        "--quick", action="store_true", help="small sizes, few repetitions, bars not judged; seconds in all"
    )
    found.add_argument("--threads", type=int, default=1, help="threads of each provider (default: %(default)s)")
    found.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    found.add_argument("--only", default="", metavar="PATTERN", help="only cases and values that match this expression")
    found.add_argument("--against", metavar="REF", help="also build and time this git revision of detr_fast")
    found.add_argument("--update", action="store_true", help="ptx, triton: make these the numbers of the tests")
    found.add_argument("--output", type=Path, metavar="FILE", help="CSV to append to (default: of this machine)")
    return found


def benchmarks_of(suite: str, options: Options) -> Iterator[Benchmark]:
    return importlib.import_module(f"benchmarks.{suite}").benchmarks(options)


class Run:
    """Prints and stores what is measured, and remembers which bars hold."""

    def __init__(self, options: Options, threads: int, device_name: str, output: Path) -> None:
        self.options, self.threads, self.device_name, self.output = options, threads, device_name, output
        self.other: OtherRevision | None = None
        self.date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.commit = machine.revision()
        self.bars: list[tuple[str, bool]] = []

    def time(self, suite: str, index: int, benchmark: Benchmark) -> None:
        samplers: list[Sampler] = [LocalSampler(benchmark, name, self.options.device) for name in benchmark.providers]
        if self.other is not None:
            samplers += self.other.samplers(suite, index, benchmark)
        timings = measure(samplers, self.options.seconds)
        case = benchmark.case + (f", {self.threads} threads" if self.threads > 1 else "")
        print(f"\n{case}: {benchmark.axis} = {benchmark.value}")
        print(table(timings))
        microseconds = {name: timing.median for name, timing in timings.items()}
        megabytes = {name: timing.peak_mb for name, timing in timings.items() if timing.peak_mb is not None}
        for bar in () if self.options.quick else benchmark.bars:
            judged = bar.judge(megabytes if isinstance(bar, Smaller) else microseconds)
            if judged is not None:
                text, holds = judged
                print(f"  {'holds' if holds else 'SHORT'}  {text}")
                self.bars.append((f"{case}, {benchmark.value}: {text}", holds))
        results.append([self._row(case, benchmark, *entry) for entry in timings.items()], self.output)

    def _row(self, case: str, benchmark: Benchmark, name: str, timing: Timing) -> results.Row:
        provider, _, other = name.partition(" @ ")
        return results.Row(
            case=case,
            provider=provider,
            axis=benchmark.axis,
            value=benchmark.value,
            median_us=timing.median,
            p20_us=timing.quantile(20),
            p80_us=timing.quantile(80),
            peak_mb=timing.peak_mb,
            device=self.device_name,
            torch=torch.__version__,
            triton=machine.version_of("triton"),
            commit=other or self.commit,
            date=self.date,
        )

    def summarize(self) -> None:
        short = [text for text, holds in self.bars if not holds]
        print(f"\n{len(self.bars) - len(short)} of {len(self.bars)} bars hold; rows are in {self.output}")
        for text in short:
            print(f"  SHORT  {text}")


def table(timings: dict[str, Timing]) -> str:
    """Medians with their spread; ratios to the first provider."""
    on_device = any(timing.device_activity for timing in timings.values())
    header = ["provider", "median us", "p20", "p80", "ratio", "peak MB"]
    rows = [header + (["launches", "syncs"] if on_device else [])]
    first = timings.get(OURS) or next(iter(timings.values()))
    for name, timing in timings.items():
        numbers = (timing.median, timing.quantile(20), timing.quantile(80))
        peak = "" if timing.peak_mb is None else f"{timing.peak_mb:.1f}"
        activity = [str(x) for x in timing.device_activity] if timing.device_activity else []
        rows.append([name, *(f"{x:.4g}" for x in numbers), f"{timing.median / first.median:.3g}x", peak, *activity])
    widths = [max(len(row[k]) for row in rows if k < len(row)) for k in range(len(rows[0]))]
    lines = ["  ".join(x.ljust(w) if k == 0 else x.rjust(w) for k, x, w in zip(count(), row, widths)) for row in rows]
    return "\n".join(f"  {line}" for line in lines)


if __name__ == "__main__":
    main()
