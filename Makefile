# For users: `make demo` and `make test`. For contributors also `make check`: see CONTRIBUTING.md.
# Everything is installed into .venv.

PYTHON ?= $(shell sh scripts/find_python.sh)
VENV ?= .venv
BIN := $(VENV)/bin
# Files or tests, e.g. TESTS='tests/test_model.py -k yarn'; all without. Those of the real checkpoint
# are `make test-real`'s.
TESTS ?=
# Which of them, e.g. MARKS='not slow'.
MARKS ?=
# More flags for each run of pytest, e.g. PYTEST_FLAGS='-x --durations=10'.
PYTEST_FLAGS ?=
# What is installed beside the package.
EXTRAS ?= dev
# The version of jax for the tests, e.g. JAX='jax==0.11.*'.
JAX ?= jax
# Where this would install a CUDA build, point pip to the CPU builds or name another.
TORCH ?= torch==2.13.0
# The platforms of `make wheels`: see scripts/build_kernels.py.
TARGETS ?= linux-x86_64 linux-aarch64 macos-arm64 windows-x86_64

# What the kernels are compiled from: an installation older than one of them compiles them anew.
KERNELS := $(wildcard src/meshwen/ops/cpu/csrc/*) scripts/build_kernels.py hatch_build.py
# What is imported is compiled to bytecode then: pip would do all of it, half of its time.
pip = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
# $(call install,ENVIRONMENT,EXTRAS,MORE REQUIREMENTS): the package, compiled by what is installed first.
install = $(1)/bin/python scripts/requirements.py $(2) > $(1)/requirements.txt && \
  $(pip) -r $(1)/requirements.txt $(3) && $(pip) --no-build-isolation --no-deps -e .

.PHONY: demo test test-hermetic test-real test-torch test-harness test-tt check fuzz lint format kernels wheels clean

demo: $(VENV)/.installed
	@$(BIN)/meshwen generate --mesh 1x8 --temperature 0 \
	  'Maya buys 4 books at $$7 each and pays with $$50. How much change does she get?'

test: test-hermetic $(if $(TESTS),,test-real)

# A process for each core, four at most: most of the time goes by in compiling, on one thread. The
# tests of a file stay in one process and share what they compiled.
test-hermetic: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
	  --no-loadscope-reorder -m 'not real$(if $(MARKS), and ($(MARKS)))' $(PYTEST_FLAGS) $(TESTS)

# The real checkpoint's tests, where it is at hand: each takes all cores and up to 10 GB.
test-real: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m real $(PYTEST_FLAGS)

# What PyTorch and transformers compute, in an environment of its own: the package needs neither.
test-torch: $(VENV)-torch/.installed
	$(VENV)-torch/bin/python -c 'import torch, transformers'  # Without them all tests would skip.
	$(VENV)-torch/bin/python -m pytest -m torch $(PYTEST_FLAGS)

# lm-evaluation-harness, driving the demo model on local data.
test-harness: $(VENV)-harness/.installed
	$(VENV)-harness/bin/python -c 'import lm_eval'
	$(VENV)-harness/bin/python -m pytest tests/test_evals_harness.py $(PYTEST_FLAGS)

# The loader for Tenstorrent's tt-forge-models, called as their runner calls it, with their versions.
TT_LOADER := integrations/tt_forge_models/qwen_2_5/causal_lm/jax
test-tt: $(VENV)-tt/.installed
	PYTHONPATH=src $(VENV)-tt/bin/python tests/tt_harness/run.py

# Format, lint, types, and the tests near what has changed since the last commit, in under a minute.
check: $(VENV)/.installed-dev
	$(BIN)/python scripts/check.py

# Altered files for every reader, for FUZZ_SECONDS; what is misread stays in tests/data/fuzz.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/.installed-dev
	$(BIN)/python scripts/fuzz.py --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The kernels alone, into the source tree, by the pinned compiler: after a change of their sources.
kernels: | $(VENV)/bin/python
	$(BIN)/python scripts/requirements.py --build > $(VENV)/requirements-build.txt
	$(call pip,$(VENV)) -r $(VENV)/requirements-build.txt
	$(BIN)/python scripts/build_kernels.py

# A wheel for each target, and the source distribution, into dist/.
wheels: $(VENV)-build/.installed
	rm -rf dist
	for target in $(TARGETS); do \
	  MESHWEN_TARGET=$$target $(VENV)-build/bin/python -m hatchling build -t wheel || exit 1; done
	$(VENV)-build/bin/python -m hatchling build -t sdist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(KERNELS) | $(VENV)/bin/python
	$(call install,$(VENV))
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(KERNELS) | $(VENV)/bin/python
	$(call install,$(VENV),$(EXTRAS),"$(JAX)")
	@touch $@ $(VENV)/.installed

$(VENV)-build/.installed: pyproject.toml scripts/build_kernels.py
	$(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/python scripts/requirements.py --build > $(VENV)-build/requirements.txt
	$(call pip,$(VENV)-build) -r $(VENV)-build/requirements.txt
	@touch $@

$(VENV)-torch/.installed: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VENV)-torch
	$(call pip,$(VENV)-torch) "$(TORCH)"
	$(call install,$(VENV)-torch,dev transformers)
	@touch $@

$(VENV)-harness/.installed: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VENV)-harness
	$(call install,$(VENV)-harness,dev lm-eval)
	@touch $@

$(VENV)-tt/.installed: $(TT_LOADER)/requirements.txt
	$(PYTHON) -m venv $(VENV)-tt
	$(call pip,$(VENV)-tt) jax==0.7.1 jaxlib==0.7.1 flax==0.10.4 -r $<
	@touch $@

clean:
	rm -rf .venv .venv-* dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/meshwen/ops/cpu/kernels/*.so src/meshwen/ops/cpu/kernels/*.dylib src/meshwen/ops/cpu/kernels/*.dll
