# Everything a person does with this project: `make help`.
# Set-up is kept in stamp files inside .venv, so a second call goes straight to the work.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
PORT ?=
ONESHOT ?=
MODEL ?=
PYTEST_ARGS ?=
GPU_ARGS ?=

# Where PYTHON is set the GPU scripts run with it as it is: nothing is installed, no network is needed.
GPU_PYTHON := $(if $(PYTHON),$(PYTHON),$(BIN)/python)
GPU_NEEDS := $(if $(PYTHON),,$(VENV)/.dev)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --constraint requirements/constraints.txt

.PHONY: help
help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @ 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1  \2/p' $(MAKEFILE_LIST)

.PHONY: run
run: $(VENV)/.compiled ## serve a model, show an answer, keep serving (MODEL=path-or-hf:…; ONESHOT=1: stop after the answer; PORT=)
	@$(BIN)/python scripts/haiku.py $(if $(MODEL),--model '$(MODEL)') $(if $(PORT),--port $(PORT)) $(if $(filter-out 0,$(ONESHOT)),--oneshot)

.PHONY: test
test: check $(VENV)/.dev $(VENV)/.compiled ## check, then every test that needs no GPU
	@$(BIN)/worker-orcd fetch demo
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

.PHONY: gpu-check
gpu-check: $(GPU_NEEDS) ## on a GPU: what must be right and the same (MODEL=files; OUT=; GPU_ARGS=; PYTHON=python3: no .venv)
	$(GPU_PYTHON) benchmarks/gpu_suite.py check $(MODEL) $(GPU_ARGS)

.PHONY: gpu-bench
gpu-bench: $(GPU_NEEDS) ## on a GPU: how fast it is (the same variables)
	$(GPU_PYTHON) benchmarks/gpu_suite.py bench $(MODEL) $(GPU_ARGS)

.PHONY: check
check: $(VENV)/.dev ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

.PHONY: format
format: $(VENV)/.dev ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: install
install: $(VENV)/.compiled ## the package and what it needs, in .venv

.PHONY: venv
venv: $(VENV)/.made ## an empty .venv

.PHONY: constraints
constraints: $(VENV)/.dev ## pin what is in .venv now
	@$(BIN)/python scripts/constraints.py requirements/constraints.txt

.PHONY: clean
clean: ## remove .venv and everything built
	rm -rf $(VENV) build dist gpu-results src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made: scripts/venv.sh
	@scripts/venv.sh $(VENV)
	@touch $@

# version.py is not here: an editable installation follows the sources by itself.
$(VENV)/.installed: $(VENV)/.made pyproject.toml setup.py requirements/constraints.txt
	@echo "installing worker-orcd and what it needs (a few minutes the first time)"
	@$(PIP_INSTALL) --editable .
	@touch $@

# They would be compiled at first use, and are kept in the user's cache either way.
$(VENV)/.compiled: $(VENV)/.installed $(wildcard src/worker_orcd/kernels/cpu/native/*.[ch])
	@echo "compiling the CPU kernels"
	@$(BIN)/worker-orcd doctor
	@touch $@

$(VENV)/.dev: $(VENV)/.installed requirements/dev.txt
	@echo "installing what the tests need"
	@$(PIP_INSTALL) --requirement requirements/dev.txt
	@touch $@
