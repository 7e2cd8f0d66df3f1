# ControlBench. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one torch thread per process: on a shared machine more are slower
export OMP_NUM_THREADS ?= 1

.PHONY: help setup train test test-faults test-all lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## make .venv and install the tested versions into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ControlBench needs Python 3.11 or newer, found $$($(PYTHON) --version); try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@echo "installing into $(VENV) (about 6 GB with torch's CUDA packages; minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[wandb,fid,data,slurm,dev]'
	@touch $@

train: $(STAMP) ## the main job: UniCon on the embedded SD3 with canny edges, about 20 minutes on 2 cores
	$(BIN)/python -m src.train +experiment=unicon_sd3_canny

test: $(STAMP) ## the tests, under 15 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: $(STAMP) ## a dozen faults put into real trainings, some minutes
	$(BIN)/python -m pytest -m fault tests/fault

test-all: $(STAMP) ## also the long ones
	$(BIN)/python -m pytest -m ''

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/python -m ruff check src conf tests
	$(BIN)/python -m ruff format --check src conf tests

format: $(STAMP) ## let ruff put the files in order
	$(BIN)/python -m ruff check --fix src conf tests
	$(BIN)/python -m ruff format src conf tests

clean: ## remove caches; runs, .cache and .venv stay
	rm -rf .pytest_cache .ruff_cache *.egg-info build
	find src conf tests -name __pycache__ -type d -prune -exec rm -rf {} +
