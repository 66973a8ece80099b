"""How a step is computed: the switches of ``SpeedConfig`` and determinism, applied."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from detr_fast.engine.config import SpeedConfig
from detr_fast.layers.backbone import FrozenBatchNorm2d, ResNet


def apply_speed(model: nn.Module, config: SpeedConfig) -> None:
    """Sets up a model, in place; its parameters and their names stay the same.

    Convolutions are compiled for one canvas at a time (with variable sizes they would be all the same, and slower), up
    to ``most_canvases``; the transformer once, for any number of tokens. What lies between them depends on the sizes of
    the images and stays as it is. Evaluation, whose canvases are many and come once, is not compiled.
    """
    for module in model.modules():
        if isinstance(module, ResNet):
            module.arrange(torch.channels_last if config.channels_last else torch.contiguous_format)
        elif isinstance(module, FrozenBatchNorm2d):
            module.is_folded = config.fold_norms
    if config.compile:
        backbone, transformer = model.get_submodule("backbone.0"), model.get_submodule("transformer")
        backbone.compile(dynamic=False)
        transformer.compile(dynamic=True)
        backbone._compiled_call_impl = _CompiledInTraining(backbone, config.most_canvases)
        transformer._compiled_call_impl = _CompiledInTraining(transformer)


class _CompiledInTraining:
    """How a compiled module is called: compiled only in training, and for the first few shapes if ``most`` is given.

    PyTorch's own limit is one for all modules, and what runs in evaluation counts too.
    """

    def __init__(self, module: nn.Module, most: int | None = None) -> None:
        self._compiled: Any = module._compiled_call_impl
        self._plain: Any = module._call_impl
        self._module, self._most = module, most
        self._shapes: set[torch.Size] = set()

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if not self._module.training:
            return self._plain(*inputs, **options)
        if self._most is not None and inputs[0].shape not in self._shapes:
            if len(self._shapes) >= self._most:
                return self._plain(*inputs, **options)
            self._shapes.add(inputs[0].shape)
        return self._compiled(*inputs, **options)


@contextlib.contextmanager
def compilations(config: SpeedConfig) -> Iterator[None]:
    """Lets PyTorch compile as often as there are canvases; its limit is as it was afterwards."""
    if not config.compile:
        yield
        return
    limit = max(config.most_canvases, torch._dynamo.config.recompile_limit)
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield


@contextlib.contextmanager
def arithmetic(tf32: bool, deterministic: bool) -> Iterator[None]:
    """PyTorch's switches for products of float32 matrices and for determinism; as they were afterwards."""
    before: dict[str, Any] = {
        "precision": torch.get_float32_matmul_precision(),
        "convolutions": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tries": torch.backends.cudnn.benchmark,
    }
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first call
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before["precision"])
        torch.backends.cudnn.allow_tf32 = before["convolutions"]
        torch.use_deterministic_algorithms(before["deterministic"])
        torch.backends.cudnn.benchmark = before["tries"]
