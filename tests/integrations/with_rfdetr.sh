#!/usr/bin/env bash
# Tests the adapter of RF-DETR against the package itself: about 10 MB into a temporary folder, nothing into .venv.
#   tests/integrations/with_rfdetr.sh [arguments of pytest]
#   PYTHON=python3.12 RFDETR=1.11.1 tests/integrations/with_rfdetr.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# torchvision 0.(x + 15) belongs to PyTorch 2.x. Without dependencies: those that the losses import stand here, the others
# are as large as PyTorch.
minor=$("$PYTHON" -c 'import torch; print(torch.__version__.split(".")[1])')
"$PYTHON" -m pip install --quiet --no-deps --target "$folder" "rfdetr==${RFDETR:-1.11.2}" "torchvision==0.$((minor + 15)).*" \
  "pyDeprecate>=0.9,<0.10" supervision requests urllib3 charset_normalizer idna certifi

PYTHONPATH=$folder OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$PYTHON" - "$@" <<'END'
import sys

import pytest
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # a build for CUDA beside a PyTorch without it; RF-DETR's losses call none of its ops
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

import rfdetr.models.criterion  # noqa: F401  fails here rather than skip

sys.exit(pytest.main(["tests/integrations/test_rfdetr_adapter.py", *sys.argv[1:]]))
END
