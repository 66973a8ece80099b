"""How one patch computes: its mode, the installed version's quirks, the normalisers and matchers that follow."""

from __future__ import annotations

import sys

from torch import Tensor

from detr_fast.criterion import mean_box_count
from detr_fast.integrations.mode import Mode
from detr_fast.integrations.transformers.sets import Matchers
from detr_fast.integrations.transformers.versions import Quirks

_NO_QUIRKS = Quirks(False, False, False, False)


class Settings:
    """Of all loss functions of one patch."""

    def __init__(self, mode: Mode, installed: Quirks) -> None:
        self.is_compat = mode == "compat"
        self.quirks = installed if self.is_compat else _NO_QUIRKS
        self.focal_kind = "focal" if self.is_compat else "focal_stable"
        invalid = ("raise" if installed.raises else "last") if self.is_compat else "skip"
        self.matchers = Matchers(invalid)

    def count_over_processes(self, offsets: Tensor) -> Tensor | None:
        """Targets by the number of processes, ``[]`` float32; None: this process's. As LW-DETR's in both modes."""
        return mean_box_count(offsets)

    def count_of_image_loss(self, offsets: Tensor) -> Tensor | None:
        """compat: the mean over the processes that accelerate knows is divided by their number once more."""
        if not self.is_compat:
            return mean_box_count(offsets)
        accelerate = sys.modules.get("accelerate")
        if accelerate is None or not accelerate.PartialState._shared_state:
            return None
        count = mean_box_count(offsets)
        return None if count is None else count / accelerate.PartialState().num_processes

    def count_of_real_time(self, offsets: Tensor) -> Tensor | None:
        """compat: each process divides by its own number of targets."""
        return None if self.is_compat else mean_box_count(offsets)
