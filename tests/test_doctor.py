"""``detr-fast doctor``: what it says of a machine that is well, and of faults that are planted."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

import detr_fast
import detr_fast.numpy
from detr_fast import ops
from detr_fast.__main__ import main
from detr_fast.doctor import activity, code_bases, library, machine, report, self_test
from detr_fast.doctor.activity import Activity, OperatorCount, activity_in, activity_of
from detr_fast.doctor.code_bases import Case, Result
from detr_fast.integrations import patching

CPU = torch.device("cpu")


class Run(NamedTuple):
    code: int
    text: str
    content: dict[str, Any]
    unchanged: bool  # generators, patches, modes


def state() -> tuple[Any, ...]:
    loss_utils = sys.modules.get("transformers.loss.loss_utils")
    return (
        torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        dict(patching._active),
        None if loss_utils is None else dict(loss_utils.LOSS_MAPPING),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command as it is called, with the least of time for measuring."""
    file = tmp_path_factory.mktemp("doctor") / "doctor.json"
    if importlib.util.find_spec("transformers"):
        importlib.import_module("transformers.loss.loss_utils")
    text = tmp_path_factory.mktemp("doctor") / "text"
    with pytest.MonkeyPatch.context() as patch, text.open("w") as stream, contextlib.redirect_stdout(stream):
        patch.setattr(code_bases, "SECONDS", 0.0)
        before = state()
        code = main(["doctor", "--json", str(file)])
        unchanged = state() == before
    return Run(code, text.read_text(), json.loads(file.read_text()), unchanged)


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_bases, "PACKAGES", {})


def test_a_machine_that_is_well(whole: Run) -> None:
    assert whole.text.splitlines()[-1] == "all is well"
    assert whole.code == 0
    assert "FAILED" not in whole.text
    for words in ("PyTorch", torch.__version__, "CPU kernels", ops.instruction_set(), "CUDA kernels", "Triton kernels"):
        assert words in whole.text
    for name in self_test.CHECKS:
        assert f"  {name} " in whole.text
    assert len(max(whole.text.splitlines(), key=len)) < 200


def test_every_installed_package_is_tried(whole: Run) -> None:
    bases = whole.content["code_bases"]
    names = [package["name"] for package in bases["packages"]]
    assert sorted([*names, *bases["not_installed"]]) == sorted(code_bases.PACKAGES)
    for package in bases["packages"]:
        assert f"{package['name']} {package['version']}" in whole.text
        if not package["supported"]:
            assert package["message"] in whole.text
            continue
        assert package["rows"]
        for row in package["rows"]:
            assert row["ok"], row["message"]
            assert min(row["milliseconds"].values()) > 0
            if row["launches"] is not None:
                assert row["launches"]["before"] > row["launches"]["after"] > 0
                assert row["waits"]["before"] >= row["waits"]["after"]


def test_the_losses_of_transformers(whole: Run) -> None:
    transformers = pytest.importorskip("transformers")
    package = next(x for x in whole.content["code_bases"]["packages"] if x["name"] == "transformers")
    assert package["version"] == transformers.__version__
    cases = {row["case"]: row for row in package["rows"]}
    assert {"DETR", "Deformable DETR", "RT-DETR", "D-FINE"} <= set(cases)
    for name, row in cases.items():
        assert row["message"] is None, name
        assert 0 < row["gradient_difference"] <= code_bases.TOLERANCE
        assert row["loss_difference"] <= code_bases.TOLERANCE
        assert row["waits"]["after"] == 0, name
        assert row["launches"]["before"] > 10 * row["launches"]["after"]


def test_json_has_everything(whole: Run) -> None:
    content = whole.content
    assert set(content) == {
        *("installed", "library_problem", "native", "self_test", "code_bases", "failures", "exit_code"),
    }
    assert (content["failures"], content["exit_code"], content["library_problem"]) == ([], 0, None)
    assert [x["name"] for x in content["self_test"] if x["device"] == "cpu"] == list(self_test.CHECKS)
    for check in content["self_test"]:
        assert set(check) == {"name", "device", "ok", "error", "allowed", "message"}
        assert 0 <= check["error"] <= check["allowed"]
    row = {"case", "ok", "message", "loss_difference", "gradient_difference", "same_pairs"}
    for package in content["code_bases"]["packages"]:
        assert set(package) == {"name", "version", "supported", "message", "rows"}
        assert all(set(x) == row | {"milliseconds", "launches", "waits"} for x in package["rows"])


def test_nothing_is_left_changed(whole: Run) -> None:
    assert whole.unchanged


def test_quick_takes_no_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr(code_bases, "PACKAGES", {"scipy": code_bases.PACKAGES["scipy"]})
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--quick", "--json", str(file)]) == 0
    assert "same pairs" in (text := capsys.readouterr().out)
    assert "ms before" not in text
    (row,) = json.loads(file.read_text())["code_bases"]["packages"][0]["rows"]
    assert row["same_pairs"]
    assert row["milliseconds"] is row["launches"] is row["waits"] is None


@pytest.mark.gpu
def test_a_gpu_is_tried_too(whole: Run) -> None:
    assert {check["device"] for check in whole.content["self_test"]} >= {"cpu", "cuda:0"}
    assert whole.content["code_bases"]["device"] == "cuda:0"
    assert whole.content["code_bases"]["counted_by"] == "profiler"


@pytest.mark.parametrize("backend", ["emulated_ops", "triton_attention"])
def test_kernels_of_a_gpu_pass_the_self_test(backend: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(backend)
    native = (
        "assign, its prices",
        "matching_cost",
        "match",
        "unite",
        *(x for x in self_test.CHECKS if "set_loss" in x),
    )
    names = native if backend == "emulated_ops" else ("attention, gradient",)
    for name in names:
        found = list(self_test.CHECKS[name](CPU))
        if backend == "triton_attention":  # the interpreter has no bfloat16
            found = [x for x in found if "float32" in x.what and "bfloat16" not in x.what]
        assert found
        assert all(x.ok for x in found), (name, [x for x in found if not x.ok])


# ---- planted faults --------------------------------------------------------------------------------------------------


def scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: function(*arguments, **options) * 1.0001


def shifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first target stays out."""

    def changed(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options).clone()
        found[:, 0] = -1
        return found

    return changed


def swapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The first two targets have each other's query."""

    def changed(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options).clone()
        found[:, :2] = found[:, :2].flip(1)
        return found

    return changed


def overpriced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Prices whose sum is right, but which prove nothing."""

    def changed(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        target_price = found.target_price.clone()
        target_price[:, :2] += torch.tensor([3.0, -3.0])
        return found._replace(target_price=target_price)

    return changed


def failing(function: Callable[..., Any]) -> Callable[..., Any]:
    def changed(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available" + 1000 * "." + "\nmore lines")

    return changed


def not_a_number(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: function(*arguments, **options) * torch.nan


def detached_in_part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Losses are right, the gradient in boxes is half."""

    def changed(logits: torch.Tensor, boxes: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return function(logits, boxes / 2 + boxes.detach() / 2, *arguments, **options)

    return changed


def worse(function: Callable[..., Any]) -> Callable[..., Any]:
    """A matching, but not the best."""

    def changed(*arguments: Any, **options: Any) -> Any:
        rows, columns = function(*arguments, **options)
        return rows, columns[::-1]

    return changed


@pytest.mark.usefixtures("without_packages")
@pytest.mark.parametrize(
    ("place", "name", "fault", "failed", "says"),
    [
        (ops, "matching_cost", scaled, ["matching_cost"], "softmax: error"),
        (ops, "matching_cost", not_a_number, ["matching_cost", "match"], "error nan"),
        (ops, "assign", shifted, ["assign, its prices", "match"], "error"),
        (ops, "assign_with_prices", overpriced, ["assign, its prices"], "prices above costs in image 0"),
        (ops, "match", shifted, ["match"], "softmax: no matching of 3 targets"),
        (ops, "match", swapped, ["match"], "softmax: beside cost and assignment"),
        (ops, "set_loss", scaled, [x for x in self_test.CHECKS if "set_loss" in x], "losses: error"),
        (
            ops,
            "set_loss",
            detached_in_part,
            [x for x in self_test.CHECKS if "set_loss" in x],
            "gradient in boxes: error",
        ),
        (ops, "unite", shifted, ["unite"], "pairs: error"),
        (ops, "unite", failing, ["unite"], "RuntimeError: CUDA error: no kernel image is available"),
        (ops, "attention", scaled, ["attention, gradient"], "float32 output"),
        (ops, "attention_reference", failing, ["attention, gradient"], "RuntimeError"),
        (detr_fast.numpy, "linear_sum_assignment", worse, ["numpy linear_sum_assignment"], "total cost of image 0"),
    ],
)
def test_a_wrong_op_is_named(
    place: ModuleType,
    name: str,
    fault: Any,
    failed: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    assert main(["doctor", "--quick"]) == 1
    text = capsys.readouterr().out
    last = text.splitlines()[-1]
    assert last.startswith("FAILED: ")
    assert last.removeprefix("FAILED: ").split("; ") == [f"{x} on cpu" for x in failed]
    assert says in text
    assert "more lines" not in text
    assert max(map(len, text.splitlines())) < 300


def result(loss: float = 2.0, gradient: float = 1.0, pairs: tuple[int, ...] = (1, 2), name: str = "loss") -> Result:
    return Result({name: torch.tensor(loss)}, [torch.tensor([gradient, 0.5])], [torch.tensor(pairs)])


def fail() -> Result:
    raise RuntimeError("no such thing\nsecond line")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A package whose only case is computed by these two functions."""

    def install(theirs: Callable[[], Result], ours: Callable[[], Result]) -> None:
        cases = {"case": lambda: Case.of_functions(theirs, ours, has_operators=True)}
        module = SimpleNamespace(cases=lambda name, device: cases)
        monkeypatch.setitem(sys.modules, "planted_cases", module)  # type: ignore[arg-type]
        monkeypatch.setattr(code_bases, "PACKAGES", {"torch": (("torch",), "planted_cases")})
        monkeypatch.setattr(code_bases, "SECONDS", 0.0)

    return install


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (lambda: result(loss=2.001), "loss differs by 0.0005"),
        (lambda: result(loss=float("nan")), "loss differs by inf"),
        (lambda: result(gradient=1.001), "gradients differ by 0.001 of the largest"),
        (lambda: result(gradient=float("nan")), "gradients differ by inf of the largest"),
        (lambda: result(pairs=(2, 1)), "other pairs"),
        (lambda: result(name="total"), "losses must be ['loss'], got ['total']"),
        (fail, "RuntimeError: no such thing"),
    ],
)
def test_a_package_with_other_numbers_is_named(
    ours: Callable[[], Result],
    says: str,
    package: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    package(result, ours)
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "FAILED: torch case"
    assert "FAILED  torch, case: " in text
    assert says in text
    content = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert content["failures"] == ["torch case"]
    assert content["exit_code"] == 1
    assert says in content["code_bases"]["packages"][0]["rows"][0]["message"]


def test_a_package_with_the_same_numbers(package: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    package(result, lambda: result(loss=2.0 + 1e-5, gradient=1 + 5e-6))
    assert main(["doctor"]) == 0
    assert "same pairs" in capsys.readouterr().out


def test_a_package_that_fails_itself_is_no_failure(
    package: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    package(fail, result)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "note    torch, case: not compared, torch itself fails: RuntimeError: no such thing" in text
    assert "second line" not in text
    assert text.splitlines()[-1] == "all that was tried is well; not compared: 1, see the notes"


def test_a_fault_while_it_is_timed_is_named(package: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    results = iter([result()])
    package(result, lambda: next(results, None) or fail())
    assert main(["doctor"]) == 1
    assert "FAILED  torch, case: RuntimeError: no such thing" in capsys.readouterr().out


def test_an_unsupported_version_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", "4.56.2")
    monkeypatch.setattr(code_bases, "PACKAGES", {"transformers": code_bases.PACKAGES["transformers"]})
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "patch: transformers must be of version 4.57.*, 5.*, found 4.56.2" in text
    assert text.splitlines()[-1] == "all is well"


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(code_bases, "PACKAGES", {"no_such_package": ((), ""), "nor_this_one": ((), "")})
    assert main(["doctor"]) == 0
    assert "not installed: no_such_package, nor_this_one" in capsys.readouterr().out


def test_json_in_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--json", str(tmp_path / "missing" / "doctor.json")]) == 2
    said = capsys.readouterr()
    assert "--json must be in a folder that exists" in said.err
    assert not said.out  # before half a minute's work


# ---- the native library ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "it was not built, or the folder is a checkout's"), (b"no library", "damaged or for another system")],
)
def test_an_unusable_library_is_explained(content: bytes | None, says: str, tmp_path: Path) -> None:
    copy = tmp_path / "detr_fast"
    shutil.copytree(Path(detr_fast.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if content is not None:
        (copy / "_C.abi3.so").write_bytes(content)
    file = tmp_path / "doctor.json"
    program = (
        # What an editable installation adds would find the checkout's library.
        "import sys; sys.meta_path[:] = [x for x in sys.meta_path if 'editable' not in repr(x)]; "
        f"from detr_fast.__main__ import main; sys.exit(main(['doctor', '--json', {str(file)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "The native library detr_fast._C (the kernels of all ops) cannot be used." in done.stdout
    assert says in done.stdout
    assert torch.__version__ in done.stdout
    assert done.stdout.splitlines()[-1] == "FAILED: native library"
    found = json.loads(file.read_text())
    assert found["exit_code"] == 1
    assert says in found["library_problem"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("x.so: undefined symbol: aoti_torch_new", "needs PyTorch 2.11 or newer, and finds 9.9"),
        ("libtorch.so: cannot open shared object file", "PyTorch's own libraries are not where it looks (9.9)"),
        ("version `GLIBCXX_3.4.32' not found", "build it here"),
        ("file too short", "damaged or for another system"),
    ],
)
def test_errors_of_the_loader_are_explained(error: str, says: str) -> None:
    text = library._explained("_C", "the kernels", ImportError(error), "9.9")
    assert error in text
    assert says in text


def test_a_library_for_another_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_numpy.cpython-39-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(detr_fast, "__file__", str(tmp_path / "__init__.py"))
    text = library._explained("_numpy", "the solver", ModuleNotFoundError("No module named 'detr_fast._numpy'"), "9.9")
    assert "_numpy.cpython-39-x86_64-linux-gnu.so in" in text
    assert "is for another Python or system" in text


def test_a_machine_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "Install PyTorch 2.11 or newer" in str(library.problem())
    assert "cannot be imported" in machine.installed()["PyTorch"]


def test_architectures_are_those_of_the_build() -> None:
    from benchmarks import ptx

    built = sorted({kernel.architecture for kernel in ptx.kernels(ptx.library())})
    assert list(library.cuda_kernels().machine_code) == built


def cubin(flags: int, version: int) -> bytes:
    identity = b"\x7fELF\x02\x01\x01\x33" + bytes([version]) + bytes(7)
    return struct.pack("<16sHHIQQQIHHHHHH", identity, 2, 190, 1, 0, 0, 0, flags, 64, 0, 0, 0, 0, 0)


def test_architectures_in_a_file() -> None:
    own = b"\x7fELF" + bytes(60)  # of the library itself
    data = own + cubin(0x500055A, 7) + b"..." + cubin(0x6006402, 8) + b"\n.target sm_100\n" + b"\x7fELF at the end"
    found = library.kernels_in(data)
    assert found == library.CudaKernels([90, 100], [100])
    assert str(found) == "compiled for sm_90, sm_100, PTX of compute_100"
    assert [capability for capability in (75, 80, 89, 90, 100, 103, 120) if found.serve(capability)] == [
        90,
        100,
        103,
        120,
    ]
    assert "not compiled" in str(library.kernels_in(own))


@pytest.mark.parametrize(("capability", "says"), [((9, 0), "used on every"), ((7, 5), "NONE for sm_75")])
def test_a_device_without_kernels_is_said(
    capability: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert says in machine._use_of(library.CudaKernels([90], [100]))


# ---- counting --------------------------------------------------------------------------------------------------------


def counted(call: Callable[[], object]) -> Activity:
    return activity_of(call, CPU)


@pytest.mark.parametrize(
    ("call", "launches", "waits"),
    [
        (lambda x: (x + 1).relu(), 2, 0),
        (lambda x: x.view(3, 2).T[0].detach(), 0, 0),  # names of the same memory
        (lambda x: torch.empty(3), 0, 0),
        (lambda x: x.sum().item(), 1, 1),
        (lambda x: bool((x > 0).any()), 2, 1),
        (lambda x: x.nonzero(), 1, 1),
        (lambda x: torch.where(x > 0)[0], 2, 1),
        (lambda x: x.masked_select(x > 0), 2, 1),
        (lambda x: x[x > 0], 2, 1),  # a mask becomes indices
        (lambda x: x[torch.tensor([0, 1])], 1, 0),
        (lambda x: x.long().unique(), 2, 1),
        (lambda x: x.cpu(), 0, 0),  # no copy here
        (lambda x: x.double(), 1, 0),
    ],
)
def test_operators_are_counted(call: Callable[[torch.Tensor], object], launches: int, waits: int) -> None:
    x = torch.randn(2, 3)
    assert counted(lambda: call(x)) == (launches, waits)


def test_backward_is_counted() -> None:
    x = torch.randn(3, requires_grad=True)
    forward = counted(lambda: (x * 2).sum()).launches
    whole = counted(lambda: torch.autograd.grad((x * 2).sum(), x)).launches
    assert forward == 2
    assert whole >= forward + 2  # what the sum begins with, and the product


def test_own_ops_are_counted_by_their_launches() -> None:
    inputs = self_test._problem()
    assert counted(lambda: ops.match(*inputs)).launches == 2
    assert counted(lambda: ops.matching_cost(*inputs)).launches == 1


def test_copies_from_a_device_are_waits() -> None:
    there = torch.empty(2, device="meta")
    assert activity._is_read("_to_copy", (there,), {"device": CPU})
    assert not activity._is_read("_to_copy", (torch.empty(2),), {"device": CPU})
    assert not activity._is_read("_to_copy", (there,), {"dtype": torch.float16})


def test_operators_return_what_they_would() -> None:
    with OperatorCount():
        assert torch.arange(4)[torch.tensor([True, False, True, False])].tolist() == [0, 2]


def test_events_of_the_profiler_are_counted() -> None:
    events = {"cudaLaunchKernel": 3, "cudaLaunchKernelExC": 2, "cuLaunchKernelEx": 1, "cudaGraphLaunch": 1}
    others = {"cudaStreamSynchronize": 4, "cudaEventSynchronize": 1, "cudaDeviceSynchronize": 1, "aten::add": 9}
    assert activity_in(events | others) == (7, 5)


def test_calls_take_turns() -> None:
    order = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        order.append("enter")
        yield
        order.append("leave")

    calls = [(lambda: order.append("theirs"), contextlib.nullcontext), (lambda: order.append("ours"), around)]
    times = activity.milliseconds(calls, CPU, seconds=0.0)
    assert order == ["theirs", "enter", "ours", "leave"] * 2
    assert all(time > 0 for time in times)


def test_columns_are_aligned() -> None:
    assert list(report.table([["a", "bb", "c"], ["aaa", "b"]])) == ["a    bb  c", "aaa  b"]
