#!/usr/bin/env bash
# Builds the source distribution, a wheel from it, and tries the wheel in empty environments.
#
#   tests/packaging/wheel_smoke.sh [VERSION...]
#
# VERSIONs of PyTorch to try it with; by default the Makefile's, against which it is always built. PYTHON chooses the
# interpreter; WHEEL=FILE tries a wheel that is there. Both files are left in dist/. Needs git, a C++ compiler and the Python
# package index. Where nvcc is found, the CUDA kernels are part of the wheel; CUDAARCHS=90 builds one of their
# architectures, in a fraction of the time.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
PINNED=$(sed -n 's/^PYTORCH := torch==//p' Makefile)
VERSIONS=("${@:-$PINNED}")
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

build() {
  # What is tracked or could be: build folders and generated lists of files must not find their way in.
  mkdir "$WORK/source"
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar --null --files-from - -cf - | tar -xf - -C "$WORK/source"

  echo "=== sdist, and the wheel from it, with torch==$PINNED"
  "$PYTHON" -m venv "$WORK/builder"
  "$WORK/builder/bin/python" -m pip install --quiet build "setuptools>=77"
  echo "torch==$PINNED" > "$WORK/constraint"
  # The wheel in an isolated environment of what pyproject.toml asks for. Two names of one thing: older and newer pip.
  {
    "$WORK/builder/bin/python" -m build --sdist --no-isolation --skip-dependency-check --outdir "$WORK/dist" "$WORK/source" &&
      PIP_CONSTRAINT="$WORK/constraint" PIP_BUILD_CONSTRAINT="$WORK/constraint" \
        "$WORK/builder/bin/python" -m pip wheel --no-deps --wheel-dir "$WORK/dist" "$WORK"/dist/*.tar.gz
  } > "$WORK/log" 2>&1 || { tail -n 50 "$WORK/log" >&2; exit 1; }
  mkdir -p dist
  cp "$WORK"/dist/* dist/
  ls -l "$WORK/dist"
  WHEEL=$(ls "$WORK"/dist/*.whl)
}

if [ -n "${WHEEL:-}" ]; then WHEEL=$(realpath "$WHEEL"); else build; fi
for version in "${VERSIONS[@]}"; do
  echo "=== $(basename "$WHEEL") with torch==$version"
  "$PYTHON" -m venv --clear "$WORK/empty"
  "$WORK/empty/bin/python" -m pip install --quiet "torch==$version" "$WHEEL"
  # Isolated and from another folder, so that only what is installed can be found.
  (cd "$WORK" && "$WORK/empty/bin/python" -I "$OLDPWD/tests/packaging/smoke.py")
done
