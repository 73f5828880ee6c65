# `make demo` and `make test` need Python 3.11+, make and a C compiler; each makes the environment $(VENV) if it is not there.

PYTHON ?= python3
VENV ?= .venv
# An editable install sees the two folders through the links in ornith_moe/; a checkout that has lost them installs a copy.
LINKS := $(wildcard ornith_moe/quant/.)
INSTALL ?= $(if $(LINKS),--editable .,.)
ARGS ?=
WORKERS ?= $(shell nproc)
TORCH := $(shell grep '^torch==' requirements.txt)
TRITON := triton==3.9.0
MLX := mlx-lm[cpu]==0.32.2
BIN := $(VENV)/bin
HERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

# A torch thread that waits spins for long by default; beside any other busy process that made a training step fifty times
# slower. A short spin is the fastest form on a quiet machine too (demo/nano.py has the figures).
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 10000

.PHONY: help demo rl test test-gpu test-verl test-oldest gpu-day gpu-wheels fuzz lint style bench figures wheel clean

help:
	@echo 'make demo      train a small Ornith, convert it, run every build in a foreign client (ARGS=--json)'
	@echo 'make rl        self-scaffolding RL of a small policy, three arms, then served (ARGS="--seeds 0 1 2")'
	@echo 'make test      lint and every test that needs no GPU (ARGS="-k fp8" picks some)'
	@echo 'make test-gpu  the tests that mean something on a GPU, there; installs nothing'
	@echo 'make gpu-day   a GPU measured in 15 minutes (ARGS="--out DIR"; ARGS=--dry without one); make gpu-wheels before'
	@echo 'make test-verl the engine of verl, in an environment of its own (.venv-verl)'
	@echo 'make test-oldest  what matters, with the oldest versions that setup.py names (.venv-oldest)'
	@echo 'make fuzz      hostile inputs against the command line (ARGS="--cases 5000 --seed 7")'
	@echo 'make figures   numbers of README.md and docs from bench/results (ARGS=--check only compares)'
	@echo 'make bench     times of this machine beside what one would use instead (ARGS=--quick)'
	@echo 'make lint | wheel | clean'

demo: $(VENV)/.installed $(VENV)/.mlx
	@$(BIN)/python demo/run.py $(ARGS)

rl: $(VENV)/.installed
	@$(BIN)/python examples/self_scaffold.py $(ARGS)

test: style
	@$(BIN)/pytest -m 'not gpu' -n $(WORKERS) --dist worksteal $(ARGS)

fuzz: $(VENV)/.installed
	@$(BIN)/python tests/fuzz/run.py $(ARGS)

# With the Python at hand where $(VENV) is not made: a machine with a GPU has its own torch, and perhaps no network.
test-gpu:
	@PYTHONPATH=. $(HERE) -m pytest -m gpu $(ARGS)

test-verl:
	@PYTHON='$(PYTHON)' .ci/verl $(ARGS)

test-oldest:
	@PYTHON='$(PYTHON)' .ci/oldest $(ARGS)

# On the machine with the GPU: gpu-day with the Python at hand, after gpu-wheels where there is a network.
gpu-day:
	@$(HERE) bench/gpu_day.py $(ARGS)

gpu-wheels:
	@$(HERE) bench/gpu_day.py --fetch $(ARGS)

style: $(VENV)/.installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

lint: style
	@$(if $(LINKS),$(BIN)/mypy --no-error-summary,echo 'types are not checked: ornith_moe/quant is no link here')

bench: $(VENV)/.installed
	@$(BIN)/ornith-moe bench $(ARGS)

figures: $(VENV)/.installed
	@$(BIN)/python -m ornith_moe.bench.published $(ARGS)

wheel: $(VENV)/.installed
	@rm -rf build
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# The pinned dependencies. torch comes first and alone, so that its own triton, where it has one, is the one that stays.
$(VENV)/.dependencies: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed, $(PYTHON) is older or missing: make PYTHON=/path/to/python3.11'; exit 1; }
	@echo 'Making $(VENV): $(TORCH), then the rest of requirements.txt; a few minutes, once.'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@$(PIP) -r requirements.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) '$(TRITON)'
	@touch $@

# What runs the demo's build for MLX; it has wheels for macOS and for Linux on x86-64 and arm64.
$(VENV)/.mlx: $(VENV)/.dependencies
	@$(PIP) --only-binary :all: '$(MLX)' || echo 'No wheel of $(MLX) fits this machine: the demo makes that build and does not run it.'
	@touch $@

# build/ may hold files of an earlier version, which a wheel would ship.
$(VENV)/.installed: $(VENV)/.dependencies setup.py pyproject.toml
	@rm -rf build
	@$(PIP) --no-deps --no-build-isolation --force-reinstall $(INSTALL)
	@rm -rf build
	@touch $@
