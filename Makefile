# Every target makes .venv, installs pinned requirements and builds what changed, then runs. On a fresh machine: python3, make, g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc bindings tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# A missing compiler is an error here, not a slow run; SMARTCLIP_BUILD=0 asks for the backends in Python only.
export SMARTCLIP_BUILD ?= 1
# Enough to compile all CUDA kernels once; an installation builds for all architectures of CMakeLists.txt.
export CUDA_ARCHS ?= 80-real;90a-real

# Two processes with a thread each: most tests are too small for two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal

.NOTPARALLEL:
.PHONY: train compare test test-all bench lint format requirements clean

train: $(VENV)/requirements-train.stamp $(VENV)/build.stamp
	$(BIN)/python -m smartclip_kernels.train

compare: $(VENV)/requirements-train.stamp $(VENV)/build.stamp
	$(BIN)/python -m smartclip_kernels.train.compare

test: $(VENV)/requirements-dev.stamp $(VENV)/build.stamp
	$(PYTEST) -m "not slow and not gpu"

test-all: $(VENV)/requirements-dev.stamp $(VENV)/build.stamp
	$(PYTEST) -m "not gpu"

bench: $(VENV)/requirements-dev.stamp $(VENV)/build.stamp
	$(BIN)/python -m bench cpu

lint: $(VENV)/requirements-dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/requirements-dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/requirements-%.stamp: requirements/%.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r $<
	touch $@

# Built with the setuptools, cmake, ninja and pybind11 of the requirements, which every target installs first.
$(VENV)/build.stamp: $(CPP) CMakeLists.txt setup.py pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Pins for Python 3.10 to 3.13, from base.in and the extras of pyproject.toml.
UNPINNED := $(addprefix --no-emit-package=,triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti \
  nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver \
  nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx)
COMPILE := uv pip compile pyproject.toml requirements/base.in --universal --python-version 3.10 --no-annotate \
  --custom-compile-command "make requirements" --quiet $(UNPINNED)
requirements:
	$(COMPILE) --extra train --extra bench --extra dev -o requirements/dev.txt
	$(COMPILE) --extra train -c requirements/dev.txt -o requirements/train.txt

clean:
	rm -rf build dist *.egg-info smartclip_kernels/_C*.so $(VENV)/build.stamp
