PYTHON ?= python3.11
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
BENCHMARKS := $(filter-out %/common.py %/summary.py,$(sort $(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help venv demo test fuzz replay lint types imports check bench

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' Makefile

venv: .venv/.stamp ## make .venv with everything installed

# torch goes first, by its exact version: asked for by a range, pip may bring in
# another version's CUDA build.
.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

demo: venv ## grow an impaired network on the digits task, into runs/demo
	$(BIN)/esper grow --task digits --host impaired --controller heuristic --seed 0 --out runs/demo --replace

# One thread each: the workers would otherwise fight over the cores.
test: venv ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The timeout is that of one property, all its cases together.
fuzz: venv ## try some 30,000 configurations, actions and damaged files, others each time
	ESPER_FUZZ=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz --timeout 1800

replay: venv ## record the committed decisions anew, after a change that is meant to decide otherwise
	$(BIN)/python tests/replay/record.py

lint: venv ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: venv ## check types
	$(BIN)/mypy

imports: venv ## check which package may import which
	$(BIN)/lint-imports --no-logo

check: test lint types imports ## everything that must pass before a change goes in

bench: venv ## run every script in benchmarks/, and write docs/benchmarks.md
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python "$$script"; done
	$(BIN)/python benchmarks/summary.py
