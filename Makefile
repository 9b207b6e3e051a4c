# Every target sets up what it needs (environment, dependencies, build) and is quick when run again.
# With nvcc the CUDA code is always built, GPU or not; without it the build is for the CPU and says so.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
NVCC := $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
SANITIZER = $(firstword $(shell command -v compute-sanitizer) $(wildcard $(dir $(NVCC))compute-sanitizer))

KERNELS := $(wildcard csrc/cuda/*.cu)
TORCH_FREE := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/params.h csrc/cuda/launch.h csrc/cuda/dispatch.h tests/kernels/*)
# The extension's own kernel objects hold no torch: the standalone program links them instead of compiling them again.
OBJECTS = $(patsubst %.cu,build/temp.$(shell $(PY) -c 'import sys, sysconfig as s; print(s.get_platform() + "-" + sys.implementation.cache_tag)')/%.o,$(KERNELS))

# What the sanitizer sees through torch: every stage forward and backward, NaN, Inf and wild experts, unaligned rows.
SANITIZED = (test_attention_given or test_gradients_given) and (basic or ragged_tile or grouped_query or routes_3 or deit) \
  or test_attention_given and (keys_5000 or topk_2048- or landmarks_1024) or non_finite or clamps or strides and 40-unaligned

.PHONY: demo test lint bench kernels sanitize newcomer build clean

demo: build
	$(PY) -m mita_ext.demo

test: build lint $(if $(NVCC),build/test_kernels)
	@$(if $(NVCC),,echo "no nvcc: the kernels were neither built nor tested")
	$(if $(and $(NVCC),$(GPU)),build/test_kernels,@echo "no GPU: the standalone kernel program was not run")
	$(PY) -m pytest

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	@! grep -nE '#include *[<"](torch|ATen|c10)/' $(TORCH_FREE) /dev/null || { echo "torch stops at csrc/cuda/mita_cuda.cpp"; exit 1; }

bench: build
	@test -n "$(GPU)" || { echo "make bench needs a GPU"; exit 1; }
	$(PY) -m bench.bench_attention --repeats-check --out bench/results/attention.json
	$(PY) -m bench.bench_stages --out bench/results/stages.json

kernels: $(VENV)/.ready
	$(PY) -m bench.kernels $(NVCC)

# racecheck follows no order between cp.async into a block's shared memory and reads of it by another block of a cluster (bench/NOTES.md).
ARGUMENTS_racecheck = -pool_route_group

sanitize:
	@test -n "$(GPU)" || { echo "make sanitize needs a GPU"; exit 1; }
	@test -n "$(SANITIZER)" || { echo "make sanitize needs compute-sanitizer, a part of the CUDA toolkit"; exit 1; }
	$(MAKE) build/test_kernels
	$(foreach tool,memcheck racecheck synccheck initcheck,$(SANITIZER) --tool $(tool) --error-exitcode 1 build/test_kernels $(ARGUMENTS_$(tool)) &&) true
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --report-api-errors no --error-exitcode 1 \
	  $(PY) -m pytest -q -m gpu -k "$(SANITIZED)" tests/test_attention.py tests/test_gradients.py tests/test_errors.py

# What the README tells to type, in a fresh clone and with environments of its own: the last commit, not the working tree.
newcomer:
	rm -rf build/newcomer
	git clone -q . build/newcomer
	cd build/newcomer && make demo && make test
	cd build/newcomer && $(PYTHON) -m venv build/isolated && . build/isolated/bin/activate && pip install . && \
	  pip install ".[timm,transformers,viz]" && cd build && python -m mita_ext
	cd build/newcomer && . .venv/bin/activate && pip install . --no-build-isolation && cd build && python -m mita_ext

build: $(VENV)/.ready
	$(PY) setup.py -q build_ext --inplace

build/test_kernels: tests/kernels/test_kernels.cu $(TORCH_FREE) | build
	$(NVCC) -std=c++17 -O2 -arch=compute_80 -code=compute_80 -Icsrc -o $@ $< $(or $(wildcard $(OBJECTS)),$(KERNELS))

$(VENV)/.ready: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q "setuptools>=77"
	$(PY) -c 'from setuptools.config.pyprojecttoml import load_file; c = load_file("pyproject.toml"); p = c["project"]; \
	  print(*c["build-system"]["requires"], *p["dependencies"], *sum(p["optional-dependencies"].values(), []), sep="\n")' > $@.txt
	$(VENV)/bin/pip install -q -r $@.txt
	touch $@

clean:
	rm -rf build dist out *.egg-info mita_ext/*.so .pytest_cache .ruff_cache
