"""Which versions of transformers are known, and where their numbers differ."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, NamedTuple

from detr_fast.integrations.patching import require_version

SUPPORTED = ("4.57", "5")

_DETECTION = ("logits", "labels", "device", "pred_boxes", "config", "outputs_class", "outputs_coord")
_SEGMENTATION = (*_DETECTION[:4], "pred_masks", *_DETECTION[4:])
_ENCODER = (*_DETECTION, "enc_topk_logits", "enc_topk_bboxes", "denoising_meta_values")

# Functions of transformers.loss.loss_utils that have a replacement, with their parameters as they are called.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "ForObjectDetectionLoss": _DETECTION,
    "ForSegmentationLoss": _SEGMENTATION,
    "DeformableDetrForObjectDetectionLoss": _DETECTION,
    "DeformableDetrForSegmentationLoss": _SEGMENTATION,
    "RTDetrForObjectDetectionLoss": _ENCODER,
    "DFineForObjectDetectionLoss": (*_ENCODER, "predicted_corners", "initial_reference_points"),
    "Deimv2ForObjectDetectionLoss": (*_ENCODER, "predicted_corners", "initial_reference_points"),
    "LwDetrForObjectDetectionLoss": (*_DETECTION, "enc_outputs_class", "enc_outputs_coord"),
}


class Quirks(NamedTuple):
    """Faults and definitions that some versions have and others do not; "compat" follows the installed one."""

    raises: bool  # logits that are not finite end in SciPy's ValueError
    cardinality_of_last_class: bool  # of sigmoid models, too: queries whose largest logit is not the last
    result_with_denoising: bool  # RT-DETR, D-FINE: the last layer is matched together with its denoising queries
    auxiliary_needs_denoising: bool  # D-FINE: no losses of other layers without denoising queries


_OF_NEWER_VERSIONS = ("Deimv2ForObjectDetectionLoss", "LwDetrForObjectDetectionLoss")


def check_version() -> None:
    """Raises an ImportError if the installed version is not known, or a loss function is not what is expected.

    All of `PARAMETERS` must be there but those of newer versions, have these parameters, and be reached by
    ``LOSS_MAPPING``.
    """
    import transformers
    from transformers.loss import loss_utils

    require_version("transformers", transformers.__version__, SUPPORTED)
    for name, expected in PARAMETERS.items():
        function = getattr(loss_utils, name, None)
        if function is None and name in _OF_NEWER_VERSIONS:
            continue
        if function is None:
            raise ImportError(
                f"patch: transformers.loss.loss_utils must have {name}, found none in version "
                f"{transformers.__version__}",
                name="transformers",
            )
        parameters = inspect.signature(function).parameters.values()
        found = tuple(x.name for x in parameters if x.kind is not inspect.Parameter.VAR_KEYWORD)
        if found != expected:
            raise ImportError(
                f"patch: {name} of transformers must have the parameters {', '.join(expected)}, found "
                f"{', '.join(found)} in version {transformers.__version__}",
                name="transformers",
            )
        if not any(function is value for value in loss_utils.LOSS_MAPPING.values()):
            raise ImportError(
                f"patch: LOSS_MAPPING of transformers must lead to {name}, which others seem to have replaced",
                name="transformers",
            )


def installed_quirks() -> Quirks:
    """Read off the installed functions themselves: the versions that changed them are not on record."""
    from transformers.loss import loss_d_fine, loss_deformable_detr, loss_for_object_detection, loss_rt_detr

    matcher = _code(loss_for_object_detection.HungarianMatcher.forward)
    return Quirks(
        raises="nan_to_num" not in matcher.co_names,
        cardinality_of_last_class="loss_cardinality" not in vars(loss_deformable_detr.DeformableDetrImageLoss),
        result_with_denoising=not _assigns(loss_rt_detr.RTDetrForObjectDetectionLoss, "logits"),
        auxiliary_needs_denoising="normal_out_class" not in _code(loss_d_fine.DFineForObjectDetectionLoss).co_varnames,
    )


def _code(function: Callable[..., Any]) -> CodeType:
    return inspect.unwrap(function).__code__


def _assigns(function: Callable[..., Any], name: str) -> bool:
    tree = ast.parse(inspect.getsource(function))
    return any(isinstance(x, ast.Name) and x.id == name and isinstance(x.ctx, ast.Store) for x in ast.walk(tree))
