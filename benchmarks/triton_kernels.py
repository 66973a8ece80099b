"""What the compiler makes of the Triton kernels: registers, spills, shared memory, and instructions a score.

``python -m benchmarks.run triton`` compiles them for GPUs that need not be there, in some minutes.
`detr_fast/ops/triton/resources.csv` holds the numbers that a test compares, one set for each release of Triton.
"""

from __future__ import annotations

import csv
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import ptx, sass
from benchmarks.machine import REPOSITORY
from detr_fast.ops.triton import attention_backward, attention_forward
from detr_fast.ops.triton.choice import CANDIDATES, Tiles

RECORDED = REPOSITORY / "detr_fast" / "ops" / "triton" / "resources.csv"
ARCHITECTURES = (80, 90, 100)
KERNELS = {
    "forward": attention_forward.forward,
    "backward_of_queries": attention_backward.backward_of_queries,
    "backward_of_keys": attention_backward.backward_of_keys,
}
# Of matrices, on tensor cores, and in full precision.
_PRODUCTS = {True: re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b"), False: re.compile(r"\bFFMA\b")}
_EXPONENTIAL = re.compile(r"\bMUFU\.EX2\b")


@dataclass(frozen=True, order=True)
class Case:
    """One kernel as it is compiled."""

    kernel: str
    products: str  # "half" or "masked", both bfloat16 here, or how float32 is multiplied: "tf32", "ieee"
    width: int  # of a head, key and value alike
    mask: str
    dropout: bool
    cut: Tiles
    architecture: int

    @property
    def name(self) -> str:
        kind = self.products.replace("masked", "half") + f", {self.mask} mask" * (self.mask != "none")
        cut = f"{self.cut.queries}x{self.cut.keys}, {self.cut.warps} warps, {self.cut.stages} stages"
        cut += f", {self.cut.chunk} columns" * (self.cut.chunk < self.width)
        return f"{self.kernel}, {kind}, width {self.width}, {cut}" + ", dropout" * self.dropout


@dataclass(frozen=True)
class Compiled:
    """What became of it."""

    name: str
    architecture: int
    registers: int  # of a thread
    stack: int  # bytes of a thread; spilled registers are there
    shared: int  # bytes of a block
    per_score: float  # instructions of the main loop for one pair of query and key; a thread's, as issued


def cases(quick: bool = False) -> Iterator[Case]:
    """Every candidate of DETR's head width, the first of the others; `quick`: what one test can compile."""
    for kernel, by_width in CANDIDATES.items():
        for (products, width), cuts in by_width.items():
            is_ours = (products, width) == ("half", 32)
            if quick and not is_ours:
                continue
            for architecture in (90,) if quick else ARCHITECTURES:
                for cut in cuts if is_ours and not quick else cuts[:1]:
                    for dropout in (False, True):
                        if products != "masked":
                            yield Case(kernel, products, width, "none", dropout, cut, architecture)
                        if products == "masked" or (products == "ieee" and width == 32):
                            yield Case(kernel, products, width, "boolean", dropout, cut, architecture)
                            yield Case(kernel, products, width, "additive", dropout, cut, architecture)


def compiled(case: Case) -> Compiled:
    kernel = KERNELS[case.kernel]
    constants: dict[str, Any] = {
        "HEADS": 8,
        "QUERIES": case.cut.queries,
        "KEYS": case.cut.keys,
        "KEY_WIDTH": case.width,
        "KEY_PADDED": case.width,
        "VALUE_WIDTH": case.width,
        "VALUE_PADDED": case.width,
        "IMAGES": 16,
        "MASK": case.mask,
        "DROPOUT": case.dropout,
        "PRECISION": "tf32" if case.products == "tf32" else "ieee",
        "CHUNK": case.cut.chunk,
        "STAGES": case.cut.stages,
    }
    signature = {name: "constexpr" if name in constants else _type(name, case) for name in kernel.arg_names}
    places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
    aligned = [name for name, kind in signature.items() if kind[0] == "*" or _is_aligned(name)]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", case.architecture, 32),
        options={"num_warps": case.cut.warps, "num_stages": case.cut.stages, "enable_fp_fusion": True},
    )
    (found,) = ptx.kernels_of(made.asm["cubin"])
    length = main_loop(made.asm["cubin"], case)
    threads = 32 * case.cut.warps
    per_score = length * threads / (case.cut.queries * case.cut.keys)
    return Compiled(
        case.name, case.architecture, found.registers, found.stack, made.metadata.shared, round(per_score, 2)
    )


def _type(name: str, case: Case) -> str:
    if name in ("scale", "kept"):
        return "fp32"
    if name in ("max_query", "max_key"):  # named like pointers
        return "i32"
    if name in ("query_offsets", "key_offsets", "query_words", "key_words"):
        return "*i32"
    if name in ("log_sum_exp", "means"):
        return "*fp32"
    if name == "mask":
        return "*u8" if case.mask == "boolean" else "*fp32"
    if name.endswith(("gradient", "query", "key", "value", "output")):
        return "*bf16" if case.products in ("half", "masked") else "*fp32"
    return "i32"


def _is_aligned(name: str) -> bool:
    return name.endswith("stride") and not name.startswith("mask")


def main_loop(cubin: bytes, case: Case) -> float:
    """Instructions of the loop that multiplies matrices and takes exponentials, for one block; NaN if none is found."""
    tool = sass.nvdisasm()
    if tool is None:
        raise FileNotFoundError("nvdisasm: install the CUDA toolkit or Triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    instructions, loops = sass.loops(said)
    scores = case.cut.queries * case.cut.keys // (32 * case.cut.warps)

    product = _PRODUCTS[case.products != "ieee"]

    def count(loop: tuple[int, int], pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(line)) for line in instructions[loop[0] : loop[1] + 1])

    # One block of keys: its exponentials and a few more of each row. Branches back from waits that stand at the end of
    # the kernel look like loops too, longer ones.
    blocks = [x for x in loops if scores <= count(x, _EXPONENTIAL) < 1.5 * scores + 8 and count(x, product)]
    if not blocks:  # some masks: the compiler wove it into the peeled block
        return math.nan
    start, end = min(blocks, key=lambda loop: loop[1] - loop[0])
    length = end - start + 1
    for inner in loops:  # products of a few columns at a time
        if start < inner[0] and inner[1] < end and count(inner, product):
            length += (inner[1] - inner[0] + 1) * (case.width // case.cut.chunk - 1)
    return length


def recorded() -> dict[tuple[str, int], Compiled]:
    """Of the installed release of Triton; empty if there is none."""
    found: dict[tuple[str, int], Compiled] = {}
    if not RECORDED.exists():
        return found
    with RECORDED.open(newline="") as file:
        for row in csv.DictReader(file):
            if row.pop("triton") == triton.__version__:
                numbers = {
                    x.name: float(row[x.name]) if x.name == "per_score" else int(row[x.name])
                    for x in fields(Compiled)[1:]
                }
                found[row["name"], int(row["architecture"])] = Compiled(row["name"], **numbers)  # type: ignore[arg-type]
    return found


def record(found: list[Compiled]) -> None:
    """Makes these the numbers of this release of Triton."""
    rows: list[dict[str, Any]] = []
    if RECORDED.exists():
        with RECORDED.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["triton"] != triton.__version__]
    rows += [{"triton": triton.__version__, **asdict(x)} for x in found]
    with RECORDED.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["triton", *(x.name for x in fields(Compiled))], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def stated() -> dict[str, str]:
    """Kernels that `detr_fast/ops/triton/README.md` tells of: its titles, and their names here."""
    titles = {"forward": "forward", "backward_of_queries": "backward, queries", "backward_of_keys": "backward, keys"}
    names = {}
    for case in cases(quick=True):
        names[titles[case.kernel] + ", dropout" * case.dropout] = case.name
    large = CANDIDATES["forward"]["half", 32][1]
    names["forward, the larger blocks"] = Case("forward", "half", 32, "none", False, large, 90).name
    return names


def report(found: list[Compiled]) -> str:
    """A line for each kernel, a column for each architecture: registers, shared memory, instructions a score."""
    by_name: dict[str, dict[int, Compiled]] = {}
    for one in found:
        by_name.setdefault(one.name, {})[one.architecture] = one
    width = max(map(len, by_name))
    title = "registers, KiB shared, instr/score"
    lines = [f"{title:{width}}  " + "  ".join(f"{f'sm_{a}':>16}" for a in ARCHITECTURES)]
    for name, of_architecture in by_name.items():
        cells = []
        for architecture in ARCHITECTURES:
            _, _, registers, stack, shared, per_score = astuple(of_architecture[architecture])
            cells.append(f"{registers}{f'+{stack}B' if stack else ''} {shared / 1024:.0f} {per_score:.2f}")
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:>16}" for cell in cells))
    spilled = sum(one.stack > 0 for one in found)
    return "\n".join([*lines, f"Triton {triton.__version__}: {len(found)} kernels, {spilled} with a stack (or spills)"])


def print_report(update: bool) -> None:
    found = [compiled(case) for case in tqdm(list(cases()), desc="compiling")]
    print(report(found))
    if update:
        record(found)
