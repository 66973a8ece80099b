"""RT-DETR's matchers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detr_fast import matcher as core
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.ops.matching_cost import ClassKind

_COSTS = ("cost_class", "cost_bbox", "cost_giou")


class HungarianMatcher(core.HungarianMatcher):
    """Matcher of RT-DETR (v1): ``matcher(outputs, targets)`` is a list of pairs (queries, targets), CPU int64.

    cost_class focal (`use_focal_loss`) or minus softmax, L1 and GIoU of cxcywh boxes, weighted by `weight_dict` with
    the keys ``cost_class``, ``cost_bbox`` and ``cost_giou``. With Predictions and Targets it returns query_of_target
    ``[L, T]`` on their device.

    Mode "compat" differs from "stable" in two things. The class cost has 1e-8 inside its logarithms, which flattens it
    for logits beyond about 15. A pair without finite cost (NaN or infinite predictions) is an error that names it, as
    the published code fails in SciPy or on an assertion; on other devices than the CPU, where looking would wait, it is
    skipped and reported by :meth:`report`, as "stable" does everywhere.
    """

    __share__ = ("use_focal_loss",)  # read by the code base's YAML registry

    def __init__(
        self,
        weight_dict: Mapping[str, float],
        use_focal_loss: bool = False,
        alpha: float = 0.25,
        gamma: float = 2.0,
        *,
        mode: Mode = "stable",
    ) -> None:
        name = type(self).__name__
        check_mode(name, mode)
        missing = [cost for cost in _COSTS if cost not in weight_dict]
        if missing:
            raise ValueError(f"{name}: weight_dict must have {', '.join(_COSTS)}, got {sorted(weight_dict)}")
        focal: ClassKind = "focal_stable" if mode == "stable" else "focal"
        super().__init__(
            *(weight_dict[cost] for cost in _COSTS),
            kind=focal if use_focal_loss else "softmax",
            alpha=alpha,
            gamma=gamma,
            invalid=self._policy(mode),
        )
        self.use_focal_loss, self.mode = use_focal_loss, mode

    @staticmethod
    def _policy(mode: Mode) -> Any:
        return "skip" if mode == "stable" else None


class HungarianMatcherv2(HungarianMatcher):
    """Matcher of RT-DETRv2: as v1's, but dictionaries are answered with ``{"indices": pairs}``."""

    def forward(self, outputs: Any, targets: Any) -> Any:
        found = super().forward(outputs, targets)
        return found if isinstance(found, Tensor) else {"indices": found}
