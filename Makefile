# Every target does its own set-up in .venv; nothing else on the machine is touched.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test chaos check bench bench-overload bench-batching bench-durable bench-loop bench-regions lab soak proto lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Nearloop needs Python 3.11 or 3.12 (Triton on the CPU needs numpy 1): install one, or say make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up .venv with $(PYTHON) (once; about a minute) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## agents answer questions through the whole real path; ARGS='--ask "how do I ..."'
	@$(BIN)/nearloop demo $(ARGS)

test: $(READY) ## the fast tests, on a real nats-server and a real Triton
	$(BIN)/python -m pytest -q -m "not chaos" $(ARGS)

chaos: $(READY) ## kill -9 of every part in mid-work, jobs and runs; a region cut off
	$(BIN)/python -m pytest -q -m chaos $(ARGS)

check: $(READY) ## ruff, mypy --strict, generated code fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -P tests/check_proto.py

bench: $(READY) ## the path beside a hand-written floor; ARGS='--quick'
	@$(BIN)/python -m tests.bench $(ARGS)

bench-overload: $(READY) ## the defaults under .5 to 10 times the capacity, elephant and mice, tiers; ARGS='--quick'
	@$(BIN)/python -m tests.bench.overload $(ARGS)

bench-batching: $(READY) ## batches made by the worker beside Triton's batcher with the best delay for each load; ARGS='--quick'
	@$(BIN)/python -m tests.bench.batching $(ARGS)

bench-durable: $(READY) ## what it costs that each step of a run survives everything; ARGS='--quick'
	@$(BIN)/python -m tests.bench.durable $(ARGS)

bench-loop: $(READY) ## 64 agents that think in Triton and wait for a tool, beside clients that block on each call; ARGS='--quick'
	@$(BIN)/python -m tests.bench.loop $(ARGS)

bench-regions: $(READY) ## ten dependent calls of a far API: by the client, by Execute, as a run, as fifty runs; ARGS='--quick'
	@$(BIN)/python -m tests.bench.regions $(ARGS)

lab: $(READY) ## every policy against its oracle, simulated; ARGS="A1 --policy my_module:MyPolicy"
	@$(BIN)/python -m tests.lab $(ARGS)

soak: $(READY) ## ten thousand steps in flight on 500 sessions, stalled readers among them; ARGS="--minutes 10"
	@$(BIN)/python -m tests.bench.soak $(ARGS)

proto: $(READY) ## regenerate the Python code of proto/
	$(BIN)/python -P tests/check_proto.py --write

lock: $(READY) ## resolve requirements.lock anew
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.11 --override config/lock-overrides.txt --generate-hashes --no-annotate --no-header -o requirements.lock

clean: ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
