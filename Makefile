# Everything happens in .venv; the first call of a target creates it. `make PYTHON=python3.12 ...` chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := CMakeLists.txt setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
NATIVE := $(wildcard $(foreach folder,csrc csrc/* tests/native tests/emulator tests/emulator/include,\
	$(foreach ending,h cpp cu,$(folder)/*.$(ending))))

.PHONY: demo test test-slow lint bench docs wheel-smoke clean

demo: .venv/installed
	$(BIN)/detr-fast demo --output runs/demo

test: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

# Killed workers, cut networks, torch.compile, sanitizers: minutes.
test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --maxprocesses 2

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.tables --check README.md

bench: .venv/installed-bench
	$(BIN)/python -m benchmarks.run assignment matching criterion adapters attention transformer model train_step input_pipeline

# Writes build/docs. Nothing is imported, the pages of the API are read from the source. (--quiet would hide faults.)
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Source distribution and wheel, tried in an empty environment; more versions of PyTorch: see the script.
wheel-smoke:
	PYTHON=$(PYTHON) tests/packaging/wheel_smoke.sh

# One version for everybody who develops; the package itself takes any from 2.11 on. Triton is the one that belongs to it:
# PyTorch's CUDA builds bring it, the tests interpret and compile its kernels on a CPU too.
PYTORCH := torch==2.13.0
TRITON := triton==3.7.1

.venv/torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PYTORCH) "setuptools>=77" wheel cmake ninja pybind11 numpy
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation -e .
	touch $@

.venv/installed-%: .venv/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[$*]" $(PYTORCH) $(TRITON)
	touch $@

clean:
	rm -rf .venv build *.egg-info detr_fast/*.so
