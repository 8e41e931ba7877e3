# make train  watches a Swin V2 MoE learn; make test runs the tests. Both set up .venv first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= configs/fashion_mnist/swin_moe_micro.yaml
ARGS ?=
VENV := .venv
# One more than there are cores: tests of launchers and faults mostly wait, and so they come first.
SIDE_BY_SIDE = -n $$(($$(nproc) + 1)) --dist loadfile --no-loadscope-reorder
BIN := $(VENV)/bin
SOURCES := $(shell find swin_moe/csrc -type f 2>/dev/null) setup.py

.PHONY: help setup packages train evaluate test test-all tensorboard check format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Variables: CONFIG=file.yaml  ARGS='key=value --fresh'  PYTHON=python3.12"

# The stamp carries the lock's digest, so that a second run starts at once and a new lock installs.
STAMP := $(VENV)/.installed-$(shell cat requirements/lock.txt pyproject.toml | cksum | cut -d ' ' -f 1)

$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v < (3, 14))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.10 to 3.13 is needed (make PYTHON=python3.12 ...)" >&2; exit 2; }
	@command -v g++ >/dev/null || { echo "error: g++ is missing (apt install g++)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: no venv module (apt install python3-venv)" >&2; exit 2; }
	@echo "installing the pinned packages into $(VENV); this takes a few minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements/lock.txt --compile-bytecode --no-build-isolation-package deepspeed
	@rm -f $(VENV)/.installed-* $(VENV)/.built && touch $@

ifeq ($(wildcard swin_moe/_C*.so),)
.PHONY: $(VENV)/.built
endif
$(VENV)/.built: $(STAMP) $(SOURCES)
	@echo "building the compiled ops"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps --editable .
	@touch $@

packages: $(STAMP) ## install the pinned packages alone, as an image's build does first

setup: $(VENV)/.built ## make .venv, install the pinned packages, build the compiled ops

train: setup ## train CONFIG on 2 local processes (or one per GPU)
	@launch/local.sh $(CONFIG) $(ARGS)

evaluate: setup ## evaluate the last checkpoint of RUN (default: the run of make train)
	@$(BIN)/swin-moe evaluate $(or $(RUN),runs/$(basename $(notdir $(CONFIG)))) $(ARGS)

test: setup ## run the test suite; -m unit (process, cluster, faults) in ARGS for one kind
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-all: setup ## run everything: a hundred kills, whole grids, DeepSpeed's async_io (hours)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "" $(ARGS)

tensorboard: setup ## show runs/ in the browser of this machine
	@$(BIN)/tensorboard --host 127.0.0.1 --logdir runs $(ARGS)

check: setup ## format, lint and types, as CI does
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch benchmarks/*.sh .ci/run

format: setup ## format and mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: ## resolve requirements/lock.in anew
	@$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.10 --no-header --no-annotate \
	  pyproject.toml requirements/lock.in -o requirements/lock.txt

clean: ## remove what the build made (not runs/)
	rm -rf build *.egg-info swin_moe/_C*.so $(VENV)/.built .pytest_cache .mypy_cache .ruff_cache
