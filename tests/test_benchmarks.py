"""The benchmark harness: wrong results stop it, numbers survive the CSV, bars, tables and figures are right."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lap", reason="needs the extra 'bench'")
pytest.importorskip("matplotlib", reason="needs the extra 'bench'")
pytest.importorskip("transformers", reason="needs the extra 'bench'")

from benchmarks import (
    adapters_matching,
    adapters_repositories,
    adapters_transformers,
    attention,
    criterion,
    data_parallel,
    plot,
    tables,
    train_step,
    transformer,
)
from benchmarks.assignment import batch, require_optimal
from benchmarks.harness import (
    Benchmark,
    DisagreementError,
    Faster,
    LocalSampler,
    Options,
    Smaller,
    Within,
    measure,
)
from benchmarks.machine import peak_memory, slug
from benchmarks.results import Row, append, latest, read
from benchmarks.run import main
from benchmarks.scenes import KINDS, coco_like_counts, costs, scene, training_sizes
from detr_fast.engine.profile import PARTS, Part, table

ROW = Row(
    "matcher", "detr_fast", "images x queries", "2x100", 1234.5, 1000.0, 2000.0, None, "A, b", "2", "", "c", "2026"
)


def test_a_wrong_assignment_is_never_timed() -> None:
    case = batch(costs("mid", 2, 20, 5), "mid", Options())
    right = case.providers["detr_fast"]()
    assert isinstance(right, torch.Tensor)
    case.check("detr_fast", right)
    worse = right.clone()
    worse[0, 0] = next(q for q in range(20) if q not in right[0, :5].tolist())
    with pytest.raises(DisagreementError, match="above the optimum"):
        case.check("detr_fast", worse)
    twice = right.clone()
    twice[0, 0] = twice[0, 1]
    with pytest.raises(DisagreementError, match="not 5 targets with a query each"):
        case.check("detr_fast", twice)
    wrong = replace(case, providers={"detr_fast": lambda: worse})
    with pytest.raises(DisagreementError):
        measure([LocalSampler(wrong, "detr_fast", torch.device("cpu"))], 0.01)


def test_least_cost_is_judged_within_rounding() -> None:
    cost = np.array([[0.0, 1.0], [0.0, 1.0 + 1e-7]], dtype=np.float32)
    require_optimal("either way", cost, np.array([0, 1]), np.array([1, 0]))
    require_optimal("either way", cost, np.array([0, 1]), np.array([0, 1]))


def test_wrong_losses_and_gradients_are_found() -> None:
    case = criterion.forward_and_backward(scene("mid", [3, 2], 10, layers=2), torch.device("cpu"))
    result = case.providers["detr_fast"]()
    case.check("detr_fast", result)
    for place in range(3):
        changed = list(result)  # type: ignore[call-overload]
        changed[place] = changed[place] * 1.001
        with pytest.raises(DisagreementError, match=r"loss|gradient of"):
            case.check("detr_fast", changed)


FEW = (3, 2)
ADAPTED: dict[str, Callable[[Options], Benchmark]] = {
    **{
        name: partial(adapters_transformers.of_model, name, FEW, 26 if "LW" in name else 12)
        for name in filter(adapters_transformers.is_installed, adapters_transformers.MODELS)
    },
    "Deformable-DETR": partial(adapters_repositories.deformable_detr_loss, FEW, 12),
    "DINO": partial(adapters_repositories.dino_loss, FEW, 12),
    "detrex": partial(adapters_repositories.detrex_loss, FEW, 12),
    "RT-DETRv2": partial(adapters_repositories.rtdetr_loss, FEW, 12),
    "D-FINE of the authors": partial(adapters_repositories.dfine_loss, FEW, 12),
    "RF-DETR": partial(adapters_repositories.rfdetr_loss, FEW, 4),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_code_bases_and_their_adapters_agree_before_they_are_timed(name: str) -> None:
    case = ADAPTED[name](Options(quick=True))
    assert {"detr_fast", "transformers"} <= case.providers.keys() or "definition" in case.providers
    for provider, run in case.providers.items():
        result: Any = run()
        case.check(provider, result)
    for place in range(len(result)):
        changed = list(result)
        changed[place] = changed[place] * 1.0001
        with pytest.raises(DisagreementError, match=r"total|gradient of"):
            case.check(provider, changed)


def test_bins_of_all_edges_are_those_of_the_definition() -> None:
    definition = adapters_repositories.definition("dfine")
    generator = torch.Generator().manual_seed(0)
    points, boxes = torch.rand(2, 200, 4, generator=generator)
    boxes = definition.corners(boxes * 4 - 1.5, True)  # also outside of all bins
    expected = definition.bins_of(points, boxes, 32, 4.0, torch.tensor([0.5]))
    values = definition.weighting(32, torch.tensor([0.5]), 4.0)
    found = adapters_repositories.bins_of(points, boxes, values, 4.0)
    assert {0, 31} < set(expected[0].flatten().tolist())
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_wrong_matchings_of_code_bases_are_found() -> None:
    options = Options(quick=True)
    groups = adapters_matching.rfdetr_groups(FEW, options)
    for provider, run in groups.providers.items():
        pairs: Any = run()
        groups.check(provider, pairs)
    queries, own = pairs[0]
    taken = queries.tolist()
    queries[0] = next(query for query in range(adapters_matching.GROUP) if query not in taken)
    with pytest.raises(DisagreementError, match="above the optimum"):
        groups.check(provider, [(queries, own), pairs[1]])
    assigner = adapters_matching.mmdetection_assigner(FEW, 12, options)
    for provider, run in assigner.providers.items():
        found: Any = run()
        assigner.check(provider, found)
    found[1][0] = found[1][0].roll(1)
    with pytest.raises(DisagreementError, match="above the optimum"):
        assigner.check(provider, found)
    for solver in (adapters_matching.batch_solver(3, 12, 5, options), adapters_matching.single_solver(12, 5)):
        for provider, run in solver.providers.items():
            solver.check(provider, run())


def test_wrong_attention_is_found() -> None:
    options = Options(quick=True)
    case = attention.ON_CPU[0]
    inputs = attention.Inputs.of(case, options)
    made = attention.forward_and_backward(inputs, case)
    result = made.providers["detr_fast"]()
    made.check("detr_fast", result)
    for place in range(4):
        changed = list(result)  # type: ignore[call-overload]
        changed[place] = changed[place] * 1.0001
        with pytest.raises(DisagreementError, match=r"output|gradient of"):
            made.check("detr_fast", changed)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_forward_alone_is_checked(dropout: float) -> None:
    made = attention.forward_only(attention.Inputs.of(attention.ON_CPU[0], Options(quick=True)), dropout)
    (output,) = made.providers["detr_fast"]()  # type: ignore[misc]
    made.check("detr_fast", [output])
    with pytest.raises(DisagreementError, match="output"):
        made.check("detr_fast", [output * 1.0001])


def test_a_training_step_with_a_wrong_loss_is_found() -> None:
    case = next(iter(train_step.benchmarks(Options(quick=True))))
    for provider, run in case.providers.items():
        loss = float(run())  # type: ignore[arg-type]
        case.check(provider, loss)
        wrong = 1.05 if provider == train_step.HALF else 1.003
        with pytest.raises(DisagreementError, match=f"{provider}: the loss of the first step"):
            case.check(provider, loss * wrong)


@pytest.mark.slow
def test_two_processes_train_on_the_joint_batch() -> None:
    case = data_parallel.benchmark(Options(quick=True))
    for provider, run in case.providers.items():
        losses: Any = run()
        case.check(provider, losses)
        with pytest.raises(DisagreementError, match=f"{provider}: the loss of the first step"):
            case.check(provider, [loss * 1.001 for loss in losses])


def test_bars_name_providers() -> None:
    quick = Options(quick=True)
    cases = [*attention.benchmarks(quick), *transformer.benchmarks(quick), *train_step.benchmarks(quick)]
    cases += train_step.on_device(quick)
    cases += adapters_transformers.benchmarks(quick)
    for case in cases:
        for bar in case.bars:
            assert getattr(bar, "than", bar.ours) in case.providers


def test_training_sizes_are_those_of_the_published_augmentation() -> None:
    sizes = training_sizes(200)
    assert sizes == training_sizes(200)
    assert {min(size) for size in sizes} <= set(range(480, 801))
    assert max(max(size) for size in sizes) <= 1333
    assert len(set(sizes)) > 30


def test_providers_take_turns() -> None:
    order: list[str] = []
    providers = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}  # type: ignore[misc]
    case = Benchmark("case", "axis", "value", providers, lambda name, result: None)
    samplers = [LocalSampler(case, name, torch.device("cpu")) for name in case.providers]
    timings = measure(samplers, 0.02, rounds=4)
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns.count("a") >= 4
    assert turns.count("b") >= 4
    assert all(timing.quantile(20) <= timing.median <= timing.quantile(80) for timing in timings.values())


def test_bars() -> None:
    times = {"detr_fast": 10.0, "scipy": 85.0}
    assert Faster("scipy", 8).judge(times) == ("detr_fast >= 8x scipy: 8.5x", True)
    assert Faster("scipy", 9).judge(times) == ("detr_fast >= 9x scipy: 8.5x", False)
    assert Faster("lapjvr", 3).judge(times) is None
    assert Within(9).judge(times) == ("detr_fast <= 9 us: 10 us", False)
    assert Smaller("scipy", 8).judge(times) == ("memory of detr_fast <= 1/8 of scipy: 10 MB, 85 MB", True)
    assert Smaller("scipy", 9).judge(times) == ("memory of detr_fast <= 1/9 of scipy: 10 MB, 85 MB", False)
    assert Smaller("lapjvr", 3).judge(times) is None


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "machine.csv"
    append([ROW], path)
    later = replace(ROW, date="2027", median_us=2.5, peak_mb=1.5)
    append([later, replace(later, commit="timed beside it")], path)
    rows = read([path])
    assert [row.median_us for row in rows] == [1234, 2.5, 2.5]  # four digits are kept
    assert [row.peak_mb for row in rows] == [None, 1.5, 1.5]
    assert rows[0].device == "A, b"
    assert latest(rows) == [rows[1]]
    path.write_text("case,provider\n")
    with pytest.raises(ValueError, match="columns must be case, provider, axis"):
        read([path])


def test_tables_follow_the_last_run(tmp_path: Path) -> None:
    append([ROW, replace(ROW, provider="other", median_us=24690.0)], tmp_path / "machine.csv")
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- benchmark:matcher -->\nold\n<!-- /benchmark -->\nafter\n")
    with pytest.raises(SystemExit, match="differ from"):
        tables.main([str(document), "--results", str(tmp_path), "--check"])
    tables.main([str(document), "--results", str(tmp_path)])
    text = document.read_text()
    assert "| matcher | 2x100 | 1.23 ms | 20x |" in text
    assert text.startswith("before\n<!-- benchmark:matcher -->\n|")
    assert text.endswith("<!-- /benchmark -->\nafter\n")
    tables.main([str(document), "--results", str(tmp_path), "--check"])
    document.write_text("<!-- benchmark:nothing -->\n<!-- /benchmark -->\n")
    with pytest.raises(SystemExit, match="no case begins with 'nothing'"):
        tables.main([str(document), "--results", str(tmp_path)])


def test_figures_are_drawn(tmp_path: Path) -> None:
    append([ROW, replace(ROW, provider="other", value="16x100")], tmp_path / "machine.csv")
    plot.main([str(tmp_path), "--results", str(tmp_path / "machine.csv")])
    figure = (tmp_path / "matching.svg").read_text()
    assert "<svg" in figure
    assert not (tmp_path / "criterion.svg").exists()


def test_the_overview_says_how_many_times_as_fast_a_loss_is(tmp_path: Path) -> None:
    ours = replace(ROW, case="loss and gradient, DETR of transformers", value="4x100x7", median_us=1000.0)
    ours = replace(ours, p20_us=900.0, p80_us=9e6)
    theirs = replace(ours, provider="transformers", median_us=14200.0)
    bigger = [replace(row, value="16x300x9", median_us=9e5) for row in (ours, theirs)]
    other = [replace(row, case="loss and gradient, DINO") for row in (ours, theirs)]
    other[1] = replace(other[1], provider="definition", median_us=5000.0)
    append([ours, theirs, *bigger, *other], tmp_path / "machine.csv")
    plot.main([str(tmp_path), "--results", str(tmp_path / "machine.csv"), "--format", "png"])
    assert {"overview.png", "adapters.png"} <= {path.name for path in tmp_path.iterdir()}
    figure = plot.overview(latest(read([tmp_path / "machine.csv"])))
    assert figure is not None
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert texts[:2] == ["5.0x   5 ms to 1 ms", "14.2x   14.2 ms to 1 ms"]


def test_parts_of_a_step_are_those_of_the_profile(tmp_path: Path) -> None:
    parts = {name: Part(host_us=1000.0 * (place + 1)) for place, name in enumerate(PARTS)}
    parts["forward"] = Part(host_us=9000.0)
    file = tmp_path / "table.txt"
    file.write_text(table(parts, 2))
    times, whose = plot.parts_of_table(file.read_text())
    assert (times["loss"], times["rest of forward"], whose) == (2.5, 4.5 - 1.5 - 2.0, "host")
    plot.main([str(tmp_path), "--results", str(_rows_of_nothing(tmp_path)), "--profile", f"a={file}", f"b={file}"])
    assert (tmp_path / "step.svg").exists()
    with pytest.raises(ValueError, match="must have the parts backbone"):
        plot.parts_of_table("data 1.0 2.0 ")


def _rows_of_nothing(folder: Path) -> Path:
    append([], folder / "empty.csv")
    return folder / "empty.csv"


def test_a_quick_run_prints_and_stores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    output = tmp_path / "rows.csv"
    main(["assignment", "--quick", "--only", "(assign.*trained|numpy.*mid.*float64) 100x20", "--output", str(output)])
    torch.set_num_threads(threads)
    rows = read([output])
    others = ["torch-linear-assignment"] if find_spec("torch_linear_assignment") else []
    assert [row.provider for row in rows] == [
        *("detr_fast", *others, "scipy", "lapjvr", "lapjvr_batch"),
        *("detr_fast", "scipy"),
    ]
    assert all(0 < row.p20_us <= row.median_us <= row.p80_us for row in rows)
    assert re.search(r"detr_fast +[\d.e+]+ +[\d.e+]+ +[\d.e+]+ +1x", capsys.readouterr().out)


def test_scenes_are_reproducible_and_of_their_kind() -> None:
    for kind in KINDS:
        first, again = costs(kind, 2, 30, 6), costs(kind, 2, 30, 6)
        assert torch.equal(first, again)
        assert first.isfinite().all()
    wanted = {kind: costs(kind, 20, 100, 20).argmin(-1) for kind in ("trained", "mid", "init")}
    distinct = {kind: sum(len(set(row.tolist())) for row in rows) for kind, rows in wanted.items()}
    assert distinct["trained"] > distinct["mid"] > distinct["init"]
    counts = coco_like_counts(2000)
    assert max(counts) <= 63
    assert 6 < sum(counts) / len(counts) < 8


def test_machine() -> None:
    assert slug("Intel Xeon Processor @ 2.50GHz, 2 cores") == "intel-xeon-2.50ghz-2-cores"
    assert slug("NVIDIA H200") == "h200"
    found = peak_memory(lambda: np.ones(8_000_000), torch.device("cpu"))
    assert found is None or 60 < found < 80
