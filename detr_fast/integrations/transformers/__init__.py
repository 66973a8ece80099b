"""Hugging Face transformers (4.57 and 5): the losses of its DETR models. Use :func:`detr_fast.patch`.

Replaced are the functions that ``LOSS_MAPPING`` names for DETR, Table Transformer and YOLOS (with DETR's masks), for
Conditional, DAB and Deformable DETR (with masks), RT-DETR and RT-DETRv2, D-FINE, DEIMv2, LW-DETR and RF-DETR's
detection, and the same functions as attributes of transformers' modules. They return the same triple
``(loss, loss_dict, auxiliary_outputs)`` with the same keys; entries of ``loss_dict`` keep their gradients. All decoder
layers are matched in one call, and their losses and gradients computed in another. Nothing is read back from a device,
but that mode="compat" of a version which ends in an error where predictions are not finite (4.57) waits to do the same.

Not replaced: RF-DETR's segmentation and Grounding DINO; the matchers and criteria, which no model keeps. A model whose
`loss_function` was assigned by hand keeps that function: assign ``LOSS_MAPPING[model.loss_type]`` again.

In both modes, unlike the package:

- losses of half types are computed and returned in float32 (package: in that type), of float64 in float64;
- annotations on the CPU are checked: a label that is not in ``[0, num_labels)``, or a box that is not finite or of
  negative size, is an error that names the image. The package trains the query of a label `num_labels` as "no object"
  (softmax models) or fails at an index (sigmoid), and says of such boxes only that some corners are wrong;
- annotations on a device are not looked at: a target with such a label is not matched, nor in "stable" one with such a
  box, whose losses are NaN in "compat"; `Patch.report` tells (4.57, "compat": an error);
- masks are looked at only by losses of segmentation;
- predicted boxes that are NaN are treated as logits that are NaN (package: a ValueError from the check of corners), and
  LW-DETR's class loss is finite at probabilities of exactly 0 and 1 (package: NaN);
- ``torch.compile(fullgraph=True)`` takes the losses in, after one step without it, which makes the matcher.

YOLOS with `auxiliary_loss` fails as in the package, whose configuration of it has no `decoder_layers`.

mode="compat" follows the installed version. mode="stable" differs from it:

======================================  ===================================  =======================================
                                        compat                               stable
======================================  ===================================  =======================================
class cost of sigmoid models            1e-8 inside the logarithms           log-sigmoids, for every logit; other
                                                                             matches only near probabilities 0 and 1
predictions that are not finite         matched where there is no other      not matched, counted by `Patch.report`
                                        (4.57: a ValueError)
DETR to Deformable DETR, N processes    the mean count of targets divided    the mean count of targets
under accelerate                        by N again: box (and sigmoid class)
                                        losses N times as large
RT-DETR, D-FINE, DEIMv2, N processes    each divides by its own count        the mean count of targets
LW-DETR, RF-DETR, evaluation            13 groups of 300 // 13 queries,      one group, as the model predicts: the loss
                                        the rest unmatched                   is a multiple smaller
ConditionalDetrForSegmentation          matched by softmax                   matched by sigmoid, as it is trained
RT-DETR, D-FINE before the fix          last layer matched with its          without them, as all other layers
                                        denoising queries
D-FINE before the fix                   without denoising only the last      all layers
                                        layer has losses
DEIMv2 without auxiliary losses         matched with denoising queries       without them
cardinality error of sigmoid models,    queries whose largest logit is not   queries with a probability above one half
before the fix                          the last
======================================  ===================================  =======================================

"Before the fix" is read off the installed functions. DEIMv2's union of matchings breaks ties in favour of the first
target (package: unspecified). On healthy input, in one process and a version with the fixes, only evaluation of LW-DETR
and RF-DETR and segmentation with Conditional DETR differ.

Kept in both modes: D-FINE's and DEIMv2's boxes begin with those that the first layer starts from, their distributions
do not. So entry i judges the boxes of one layer before its distributions; the last layer but one has no losses of its
own, nor the last one for denoising queries. Mending that would take other entries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from detr_fast.integrations.mode import Mode
from detr_fast.integrations.patching import Replacement
from detr_fast.integrations.transformers import d_fine, detr, lw_detr, rt_detr
from detr_fast.integrations.transformers.settings import Settings
from detr_fast.integrations.transformers.versions import check_version, installed_quirks

__all__ = ["check_version", "replacements"]

_FUNCTIONS: dict[str, Callable[..., detr.Result]] = {
    "ForObjectDetectionLoss": detr.object_detection,
    "ForSegmentationLoss": detr.segmentation,
    "DeformableDetrForObjectDetectionLoss": detr.sigmoid_object_detection,
    "DeformableDetrForSegmentationLoss": detr.sigmoid_segmentation,
    "RTDetrForObjectDetectionLoss": rt_detr.real_time_object_detection,
    "DFineForObjectDetectionLoss": d_fine.fine_grained_object_detection,
    "Deimv2ForObjectDetectionLoss": d_fine.dense_object_detection,
    "LwDetrForObjectDetectionLoss": lw_detr.grouped_object_detection,
}


def replacements(mode: Mode) -> Sequence[Replacement]:
    """Every place of the installed package that leads to one of its functions."""
    from transformers.loss import loss_utils

    settings = Settings(mode, installed_quirks())
    values = {
        getattr(loss_utils, name): partial(function, settings)
        for name, function in _FUNCTIONS.items()
        if hasattr(loss_utils, name)
    }
    return [
        Replacement(owner, attribute, values[original], settings.matchers.report)
        for owner, attribute, original in _places(loss_utils.LOSS_MAPPING)
        if original in values
    ]


def _places(mapping: dict[str, Any]) -> list[tuple[Any, str, Any]]:
    """Functions in the mapping and in the package's modules of losses: owner, name, value."""
    found: list[tuple[Any, str, Any]] = [(mapping, key, value) for key, value in mapping.items()]
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("transformers.loss.")]
    for module in modules:
        found.extend((module, name, value) for name, value in vars(module).items() if name in _FUNCTIONS)
    return found
