#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, tests, compute-sanitizer, benchmarks, traffic.
#
#   benchmarks/gpu_check.sh OUT
#
# Needs python3 with a CUDA build of PyTorch, nvcc, cmake, ninja and pybind11; providers that are not installed are left
# out. Writes OUT/log.txt, OUT/tests.xml and the rows OUT/<gpu>.csv; commit the rows under benchmarks/results/.
set -euo pipefail
OUT=${1:?"usage: benchmarks/gpu_check.sh OUT"}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."
exec > >(tee "$OUT/log.txt") 2>&1
export PYTHONUNBUFFERED=1
failed=()

step() {  # step NAME SECONDS COMMAND...: runs on whatever fails, and says so at the end
  local name=$1 limit=$2
  shift 2
  echo "=== $name"
  local start=$SECONDS
  timeout "$limit" "$@" || failed+=("$name")
  echo "--- $name: $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv,noheader
GPU=$(python3 -c "import torch; from benchmarks.machine import slug; print(slug(torch.cuda.get_device_name()))")
capability=$(python3 -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
CSV="$OUT/$GPU.csv"

# Only this GPU's code, to save minutes.
step build 240 env CUDAARCHS="$capability" python3 -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
step tests 240 python3 -m pytest -m gpu tests/gpu --junitxml "$OUT/tests.xml"
step assignment 120 python3 -m benchmarks.run assignment --device cuda --output "$CSV"
step matching 100 python3 -m benchmarks.run matching --device cuda --output "$CSV"
step criterion 60 python3 -m benchmarks.run criterion --device cuda --output "$CSV"
if command -v ncu > /dev/null; then
  step traffic 60 ncu --clock-control none --kernel-name-base function --kernel-name regex:"matching_cost|assign|set_loss|scale_gradients" \
    --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum \
    python3 -m benchmarks.traffic
fi
echo "=== $SECONDS s in all; failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
