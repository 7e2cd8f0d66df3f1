# ControlBench. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one torch thread per process: on a shared machine more are slower
export OMP_NUM_THREADS ?= 1

.PHONY: help setup train study-small bench-gpu cost-table soak report test test-faults test-all lint format clean

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

STUDY := runs/study_small
METHODS := unicon,unicon_half,dit_controlnet

study-small: $(STAMP) ## the whole chain: three methods trained, measured, evaluated, and a page about them; under an hour on 2 cores
	$(BIN)/python -m src.train -m adapter=$(METHODS) budget.images=16000 validation.every_images=4000 logger=local output_dir=$(STUDY)
	$(BIN)/python -m src.bench -m adapter=$(METHODS) hardware.checkpointing=none,both mode=measure batch=8 output_dir=$(STUDY)
	$(BIN)/python -m src.evaluate run=$(STUDY) n=256 output_dir=$(STUDY)/evaluations
	$(BIN)/python -m src.report runs=[$(STUDY)] out=$(STUDY)/report

cost-table: $(STAMP) ## what every method costs on full-size backbones, estimated; 15 minutes
	$(BIN)/python -m src.bench.table runs/cost
	$(BIN)/python -m src.report runs=[runs/cost] out=runs/cost/report

GPU := runs/bench_gpu

bench-gpu: $(STAMP) ## memory and speed on this machine's GPU, in about 10 minutes; needs neither wandb nor clean-fid
	$(BIN)/python -m src.bench -m backbone=pixart_alpha adapter=unicon,unicon_half,dit_controlnet,t2i_adapter hardware=auto resolution=512 batch=8 hardware.checkpointing=none,both mode=measure output_dir=$(GPU)
	$(BIN)/python -m src.bench -m backbone=sd3_medium adapter=unicon_half,dit_controlnet hardware=auto resolution=1024 batch=4 mode=measure output_dir=$(GPU)
	$(BIN)/python -m src.bench -m backbone=sd21 adapter=unicon_half,controlnet hardware=auto resolution=512 batch=8 mode=measure output_dir=$(GPU)
	$(BIN)/python -m src.bench.speed fused,compiled,shared_4,cached,together backbone=pixart_alpha backbone.source=random:pixart_alpha adapter=unicon_half resolution=512 hardware=auto
	$(BIN)/python -m src.report runs=[$(GPU)] out=$(GPU)/report

soak: $(STAMP) ## a long training with random kills beside one without: equal to the bit, or not
	$(BIN)/python -m tests.fault.soak --steps 4000 --kills 12 --out runs/soak/results.json

report: $(STAMP) ## tables, plots and one page of everything below runs/
	$(BIN)/python -m src.report runs=[runs] out=report

test: $(STAMP) ## the tests, under 15 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: $(STAMP) ## a dozen faults put into real trainings, some minutes
	$(BIN)/python -m pytest -m fault tests

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
