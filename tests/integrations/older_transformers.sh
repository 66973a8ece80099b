#!/usr/bin/env bash
# Runs the tests of the transformers adapter against an older transformers, in a temporary directory beside the
# environment's own: tests/integrations/older_transformers.sh [VERSION]. PYTHON is the environment's interpreter.
set -euo pipefail

version=${1:-4.57.6}
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# Without its dependencies: torch and numpy stay those of the environment.
"$python" -m pip install --quiet --no-deps --target "$folder" "transformers==$version" \
  "huggingface-hub>=0.34,<1" "tokenizers>=0.22,<=0.23"
"$python" -m pip install --quiet --target "$folder/requests" requests  # of that huggingface-hub

PYTHONPATH="$folder:$folder/requests" "$python" -c \
  "import transformers; assert transformers.__version__ == '$version', transformers.__version__"
PYTHONPATH="$folder:$folder/requests" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
  "$python" -m pytest tests/integrations/test_transformers_patch*.py
