"""One loss, forward and backward, as several code bases compute it: inputs, providers, and the check of all of them."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import OURS, Bar, Benchmark, DisagreementError
from benchmarks.scenes import scene

LAYERS, LABELS = 6, 91
USUAL, CROWDED, FULL = (4, 11, 7, 6), (60,) * 4, (150,) * 4  # targets of each image
ONE = (1,)  # one image with one target: little to save
STABLE = f"{OURS}, stable"
TOLERANCE = 2e-5  # of the largest entry
RARE = 3.0  # so far below 0 are the logits of sigmoid models on average

Target = Mapping[str, Tensor]
Meta = dict[str, Any]


class Inputs(NamedTuple):
    """What a model hands to its loss. All that needs a gradient is one tensor for all layers, as models stack them."""

    tensors: dict[str, Tensor]
    targets: list[Target]
    denoising: Meta | None = None  # as RT-DETR names it

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.tensors.items() if x.requires_grad}

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, where: torch.device | torch.dtype) -> Inputs:
        """Copies as leaves of their own; integers keep their type."""

        def moved(x: Tensor) -> Tensor:
            return x.to(where) if x.is_floating_point() or isinstance(where, torch.device) else x

        tensors = {name: moved(x.detach()).clone().requires_grad_(x.requires_grad) for name, x in self.tensors.items()}
        targets: list[Target] = [{name: moved(x) for name, x in target.items()} for target in self.targets]
        meta = self.denoising
        if meta is not None:
            meta = {**meta, "dn_positive_idx": tuple(map(moved, meta["dn_positive_idx"]))}
        return Inputs(tensors, targets, meta)


Loss = Callable[[Inputs], Tensor]  # to be differentiated
Result = tuple[Tensor, ...]  # total [], gradients of the leaves in their order


def definition(name: str) -> Any:
    """Module of tests/integrations/definitions: the plain PyTorch and SciPy that adapters are tested against."""
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    return importlib.import_module(f"integrations.definitions.{name}")


def installed_rfdetr() -> Any:
    """The package, or None if there is none or it cannot be imported."""
    try:
        importlib.import_module("rfdetr.models.criterion")
        importlib.import_module("rfdetr.models.matcher")
        return importlib.import_module("rfdetr")
    except (ImportError, RuntimeError):  # torchvision beside another build of PyTorch is a RuntimeError
        return None


def drawn(
    counts: Sequence[int],
    queries: int,
    layers: int = LAYERS,
    labels: int = LABELS,
    softmax: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Logits ``[L, B, Q, C]``, boxes ``[L, B, Q, 4]`` and targets of a model in the middle of its training."""
    made = scene("mid", counts, queries, layers, labels, seed)
    logits = made.predictions.logits
    logits = logits if softmax else logits[..., :-1] - RARE
    return logits.contiguous().requires_grad_(), made.predictions.boxes.requires_grad_(), made.targets


def denoising_meta(counts: Sequence[int], queries: int, wanted: int = 100) -> Meta:
    """About `wanted` positive queries and as many negative ones, in groups with room for the most targets."""
    found: Meta = definition("rtdetr").denoising_meta(tuple(counts), max(1, wanted // max(counts)), queries)
    return found


def size(counts: Sequence[int], queries: int) -> str:
    return f"{len(counts)}x{queries}x{sum(counts) / len(counts):.0f}"


def loss_and_gradient(
    code_base: str,
    value: str,
    inputs: Inputs,
    losses: dict[str, Loss],
    exact: Loss,
    device: torch.device,
    bars: Sequence[Bar] = (),
    exact_type: torch.dtype = torch.float64,
) -> Benchmark:
    """`exact` is what all others are checked against, computed on the CPU in `exact_type`."""
    own = inputs.to(device)
    return Benchmark(
        case=f"loss and gradient, {code_base}",
        axis="images x queries x targets",
        value=value,
        providers={name: differentiated(loss, own) for name, loss in losses.items()},
        check=Check(exact, inputs, exact_type),
        bars=bars,
    )


def differentiated(loss: Loss, inputs: Inputs) -> Callable[[], Result]:
    leaves = tuple(inputs.leaves.values())

    def run() -> Result:
        total = loss(inputs)
        return total.detach(), *torch.autograd.grad(total, leaves)

    return run


class Check:
    """Total and gradients are those of `exact`, which is asked only if something is timed."""

    def __init__(self, exact: Loss, inputs: Inputs, dtype: torch.dtype) -> None:
        self._exact, self._inputs, self._dtype = exact, inputs, dtype
        self._expected: Result | None = None

    def __call__(self, provider: str, result: Result) -> None:
        if self._expected is None:
            with _default_type(self._dtype):  # of constants such as class weights
                self._expected = differentiated(self._exact, self._inputs.to(self._dtype))()
        names = ("total", *(f"gradient of {name}" for name in self._inputs.leaves))
        for name, expected, found in zip(names, self._expected, result, strict=True):
            error = float((found.detach().cpu().double() - expected).abs().max())
            allowed = TOLERANCE * float(expected.abs().max())
            if not error <= allowed:
                raise DisagreementError(f"{provider}: {name} is off by {error:.3g}, allowed {allowed:.3g}")


@contextlib.contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """As training loops of all code bases add losses up. `weights` are those of the last layer."""
    total = 0
    for name, loss in losses.items():
        weight = next((w for base, w in weights.items() if name.startswith(base)), None)
        total = total if weight is None else total + loss * weight  # type: ignore[assignment]
    assert isinstance(total, Tensor)
    return total


def as_dictionary(logits: Tensor, boxes: Tensor) -> dict[str, Any]:  # [L, B, Q, ...]
    """The last layer, and the others as ``aux_outputs``, as all code bases of DETR hand them on."""
    layers = [{"pred_logits": x, "pred_boxes": y} for x, y in zip(logits, boxes, strict=True)]
    return {**layers[-1], "aux_outputs": layers[:-1]}
