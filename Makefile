# Every target sets up what it needs: .venv in this checkout, made once from pyproject.toml.
PYTHON ?= python3
UV := $(shell command -v uv)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-effects test-engines lint sweep table report readme bench clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"bdx needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "setting up $(VENV) (a few GB, once)"
	@if [ -n "$(UV)" ]; then \
	  uv venv -q --allow-existing --python "$$(command -v $(PYTHON))" $(VENV) && uv pip install -q --python $(BIN)/python -e '.[dev]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

setup: $(STAMP)  ## make .venv

demo: $(STAMP)  ## a backdoor on handwritten digits and two repairs, in under 3 minutes, nothing to download
	$(BIN)/bdx -m experiment=demo defense=npd_digits,d3_digits

test: $(STAMP)  ## the whole suite, at most 12 minutes on 2 cores
	$(BIN)/python -m pytest $(SPREAD)

test-fast: $(STAMP)  ## without what trains for longer, at most 3 minutes
	$(BIN)/python -m pytest $(SPREAD) -m 'not slow and not engines and not effects'

test-effects: $(STAMP)  ## trains every attack on digits until it works, 6 to 10 minutes on 2 cores
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m effects tests/test_effects.py

test-engines: $(STAMP)  ## sweeps on a SLURM and a Ray of this machine's own, which it installs as root (apt-get, pip)
	@.ci/engines $(BIN)/python
	$(BIN)/python -m pytest -m engines -n 4 -rs tests/test_engines.py  # they wait more than they work

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

TABLE ?= npd2023/table01
SCALE ?= cpu
sweep: $(STAMP)  ## run what is missing of a paper's table: make sweep TABLE=npd2023/table01 SCALE=cpu
	$(BIN)/bdx sweep $(TABLE) scale=$(SCALE)

table: $(STAMP)  ## its rows beside the printed numbers, in Markdown
	$(BIN)/bdx table $(TABLE) scale=$(SCALE)

report: $(STAMP)  ## the same with plots, as one HTML page
	$(BIN)/bdx report $(TABLE) scale=$(SCALE)

readme: $(STAMP)  ## the README's tables from experiments/results/
	$(BIN)/python -m bdx.readme

bench: $(STAMP)  ## speed, as ratios within one run
	$(BIN)/python bench/bench.py

clean:  ## remove .venv and what runs have left in ./outputs (not ./data)
	rm -rf $(VENV) outputs dist .pytest_cache .ruff_cache
