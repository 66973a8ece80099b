"""HungarianMatcher and SetCriterion of Deformable DETR, ``models/matcher.py`` and ``models/deformable_detr.py``.

from detr_fast.integrations.deformable_detr import SetCriterion, build_matcher
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from detr_fast import matcher
from detr_fast.criterion import _Matched
from detr_fast.integrations.layer_losses import Entry, ListedTargets, without_class
from detr_fast.integrations.layered_criterion import FocalAlpha, LayeredCriterion, Outputs, policy_of
from detr_fast.integrations.mode import Mode, check_mode
from detr_fast.structures import Predictions

ENTRIES = {
    "labels": (Entry("loss_ce", "class"), Entry("class_error", "class_error", ("",), has_gradient=False)),
    "cardinality": (Entry("cardinality_error", "cardinality_error", has_gradient=False),),
    "boxes": (Entry("loss_bbox", "bbox"), Entry("loss_giou", "giou")),
    "masks": (),
}


class HungarianMatcher(matcher.HungarianMatcher):
    """Matcher of Deformable DETR: class cost of the focal loss with alpha 0.25 and gamma 2, which it fixes.

    Args:
        mode: "compat": the class cost is the published one, with 1e-8 inside its logarithms, and a pair without a
            finite cost (NaN or infinite predictions, boxes of negative size, two boxes without area) an error, for
            which it waits for the device. "stable": the class cost is exact, which differs by more than 1e-4
            for logits below -10 or above 9, where the published one flattens; pairs without a finite cost are not
            matched, and ``report()`` tells.
    """

    def __init__(
        self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1, *, mode: Mode = "stable"
    ) -> None:
        check_mode("HungarianMatcher", mode)
        super().__init__(cost_class, cost_bbox, cost_giou, alpha=0.25, gamma=2.0, **policy_of(mode))
        self.mode = mode


class SetCriterion(FocalAlpha, LayeredCriterion):
    """Criterion of Deformable DETR: sigmoid focal loss, L1, GIoU, masks, and losses of the encoder's proposals.

    ``criterion(outputs, targets)`` returns unweighted 0-d tensors: ``loss_ce``, ``class_error``, ``cardinality_error``,
    ``loss_bbox``, ``loss_giou`` (``loss_mask``, ``loss_dice``) of the last layer; all but class_error and masks with
    ``_0`` to ``_{L-2}`` of the others, and with ``_enc`` of ``outputs["enc_outputs"]``, for which every target has
    label 0. Three launches for the decoder and two for the proposals, beside the names; nothing is read back.

    As published, cardinality_error takes the last class for "no object", which it is not here.

    Args:
        num_classes: logits of a query.
        focal_alpha: in [0, 1]. The published loss without alpha, for a negative one, is the one of 0.5 with twice its
            weight.
        mode: that of the matcher, whose docstring says what differs; the losses have the published numbers in both.

    In both modes a label that is not in ``[0, num_classes)``, or a box of negative size, is an error that names the
    image, if the targets are on the CPU. On a device nobody looks: in "stable" such a target is not matched and
    ``matcher_report()`` tells, in "compat" the matcher raises the error. The published
    matcher fails at such a label, or takes a negative one from the end.

    Raises:
        ValueError: `mode` is not that of a matcher that has one, or the matcher's class cost is a softmax.
    """

    entries = ENTRIES
    further_sets: ClassVar[tuple[str, ...]] = ("enc_outputs",)

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        losses: Sequence[str],
        focal_alpha: float = 0.25,
        *,
        mode: Mode = "stable",
    ) -> None:
        super().__init__(num_classes, matcher, weight_dict, losses, mode, alpha=focal_alpha)

    def forward(self, outputs: Predictions | Outputs, targets: ListedTargets) -> dict[str, Tensor]:
        predictions, packed, decoder, num_boxes = self.decoder(outputs, targets)
        sets = [decoder]
        masks = self._mask_losses(_Matched(predictions, packed, decoder.query_of_target, num_boxes))
        if not isinstance(outputs, Predictions) and "enc_outputs" in outputs:
            sets.append(self.evaluate(outputs["enc_outputs"], without_class(packed), ["_enc"], num_boxes))
        return self.dictionary(*sets) | masks


def build_matcher(args: Namespace, *, mode: Mode = "stable") -> HungarianMatcher:
    """The matcher of the published command line: ``set_cost_class``, ``set_cost_bbox`` and ``set_cost_giou``."""
    return HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou, mode=mode)
