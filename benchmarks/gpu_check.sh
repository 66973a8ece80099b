#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, tests, compute-sanitizer, benchmarks, traffic.
#
#   benchmarks/gpu_check.sh OUT [STEPS]
#
# STEPS is an expression that the names of the steps must match ("build|attention"); all by default. The limits of the
# steps add up to more than they take.
# Needs nvcc and a Python (of .venv if there is one, else python3; or PYTHON=...) with a CUDA build of PyTorch, setuptools,
# wheel, cmake, ninja, pybind11, numpy, scipy and pytest. What is not installed is left out: transformers, with
# the step that needs it, torch-linear-assignment, lapx. Writes OUT/log.txt, OUT/tests.xml, OUT/attention-tests.xml and
# the rows OUT/<gpu>.csv; commit the rows under benchmarks/results/.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  echo "usage: benchmarks/gpu_check.sh OUT [STEPS]" >&2
  exit 2
fi
WHERE=$PWD
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if ! $PYTHON -c "import torch; assert torch.cuda.is_available()" 2> /dev/null; then
  echo "gpu_check: $PYTHON must have PyTorch with a CUDA device, got none" >&2
  exit 1
fi
OUT=$(cd "$WHERE" && mkdir -p "$1" && cd "$1" && pwd)
STEPS=${2:-.}
export PYTHONUNBUFFERED=1
GPU=$($PYTHON -c "import torch; from benchmarks.machine import slug; print(slug(torch.cuda.get_device_name()))")
CSV="$OUT/$GPU.csv"
# Only this GPU's code, to save minutes.
CUDAARCHS=$($PYTHON -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
export CUDAARCHS
failed=()
ran=0

step() {  # step NAME SECONDS COMMAND...: goes on whatever fails, and says so at the end
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [[ $name =~ $STEPS ]] || return 0
  ran=$((ran + 1))
  echo "=== $name"
  timeout "$limit" "$@" || failed+=("$name")
  echo "--- $name: $((SECONDS - start)) s"
}

main() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader
  step build 100 $PYTHON -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
  step tests 90 $PYTHON -m pytest -m gpu tests/gpu tests/test_structures.py -k "not sanitizer" --junitxml "$OUT/tests.xml"
  step attention-tests 90 $PYTHON -m pytest tests/ops/test_attention_kernels.py --junitxml "$OUT/attention-tests.xml"
  step attention 80 $PYTHON -m benchmarks.run attention --device cuda --output "$CSV"
  $PYTHON -c "import transformers" 2> /dev/null && step transformer 40 $PYTHON -m benchmarks.run transformer --device cuda --output "$CSV"
  step engine-tests 60 $PYTHON -m pytest -m gpu tests/engine tests/data --junitxml "$OUT/engine-tests.xml"
  $PYTHON -c "import transformers" 2> /dev/null && step train-step 110 $PYTHON -m benchmarks.run train_step --device cuda --output "$CSV"
  step input-pipeline 50 $PYTHON -m benchmarks.run input_pipeline --device cuda --output "$CSV"
  step criterion 40 $PYTHON -m benchmarks.run criterion --device cuda --output "$CSV"
  $PYTHON -c "import transformers" 2> /dev/null && step adapters 100 $PYTHON -m benchmarks.run adapters --device cuda --only "(transformers|groups) (4|16)x" --output "$CSV"
  step matching 50 $PYTHON -m benchmarks.run matching --device cuda --output "$CSV"
  step assignment 60 $PYTHON -m benchmarks.run assignment --device cuda --output "$CSV"
  step sanitizer 70 $PYTHON -m pytest -m gpu tests/gpu -k sanitizer
  if command -v ncu > /dev/null; then
    step traffic 40 ncu --clock-control none --kernel-name-base function \
      --kernel-name regex:"matching_cost|assign|set_loss|scale_gradients" \
      --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum \
      $PYTHON -m benchmarks.traffic
  fi
  echo "=== $SECONDS s in all; steps run: $ran; failed: ${failed[*]:-nothing}"
  [ ${#failed[@]} -eq 0 ] && [ $ran -gt 0 ]
}

main 2>&1 | tee "$OUT/log.txt"
