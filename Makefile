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

cost-table: $(STAMP) ## what every method costs on full-size backbones, estimated; 20 minutes
	$(BIN)/python -m src.bench.table runs/cost
	$(BIN)/python -m src.report runs=[runs/cost] out=runs/cost/report

GPU := runs/bench_gpu
# the environment of a bare `pip install .` is enough; one that is there already: make bench-gpu BENCH_PYTHON=python3
BENCH_PYTHON ?= $(BIN)/python
MINIMAL := $(VENV)/.installed_minimal
BENCH_READY := $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(MINIMAL))
CELLS := $(BENCH_PYTHON) -m src.bench -m hardware=auto mode=measure sweep.timeout_s=120 output_dir=$(GPU)
PIXART := backbone=pixart_alpha resolution=512 batch=8
SD3 := backbone=sd3_medium resolution=1024 batch=4
GO_ON := || { touch $(GPU)/failed; echo "bench-gpu: not everything of the last command ended well, as it says above; the next one goes on" >&2; }
HAS_GPU := import sys, torch; torch.cuda.is_available() or sys.exit("error: bench-gpu: torch finds no GPU here; what full-size cells take without one: make cost-table")
# a copy of diffusers' examples/controlnet/train_controlnet_sd3.py to be measured beside: make bench-gpu PEER=<file>
PEER ?=
, := ,

$(MINIMAL): pyproject.toml constraints.txt
	@test -e $(STAMP) || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .; }
	@touch $@

# Not run on a GPU so far: its minutes are a guess, and the compiled switches may take more of them.
bench-gpu: $(BENCH_READY) ## memory and speed on this machine's GPU, in about 10 minutes; needs neither wandb nor clean-fid
	@$(BENCH_PYTHON) -c '$(HAS_GPU)'
	@mkdir -p $(GPU) && rm -f $(GPU)/failed
	$(CELLS) $(PIXART) adapter=unicon,unicon_half,dit_controlnet,t2i_adapter $(GO_ON)
	$(CELLS) $(PIXART) adapter=unicon_half,dit_controlnet hardware.checkpointing=adapter,both $(GO_ON)
	$(CELLS) $(SD3) adapter=unicon,unicon_half,dit_controlnet $(GO_ON)
	$(CELLS) backbone=sd21 resolution=512 batch=8 adapter=unicon_half,controlnet hardware.channels_last=false,true $(GO_ON)
	$(CELLS) $(PIXART) floor=true what=training,inference steps=10 repeats=5 $(GO_ON)
	$(CELLS) $(SD3) floor=true $(GO_ON)
	$(CELLS) $(PIXART) adapter=unicon_half,dit_controlnet what=inference steps=10 repeats=5 $(GO_ON)
	$(CELLS) $(PIXART) adapter=unicon_half,dit_controlnet hardware.compile=all $(GO_ON)
	$(BENCH_PYTHON) -m src.bench.speed fused,adamw8bit,fp8,int8,overlap,shared_4,cached,reuse_4,compiled,graphs,together backbone=pixart_alpha adapter=unicon_half resolution=512 hardware=auto logger=local output_dir=$(GPU) $(GO_ON)
	$(if $(PEER),$(BENCH_PYTHON) -m src.bench.peer script=$(PEER) shape=sd3_medium resolution=512 repetitions=2 hardware=auto "adapters=[dit_controlnet$(,)unicon_half]" output_dir=$(GPU) $(GO_ON))
	$(BENCH_PYTHON) -m src.report runs=[$(GPU)] out=$(GPU)/report $(GO_ON)
	$(BENCH_PYTHON) -m src.bench.markdown $(GPU) $(GO_ON)
	@! test -e $(GPU)/failed

soak: $(STAMP) ## a long training with random kills beside one without: equal to the bit, or not
	$(BIN)/python -m tests.fault.soak --steps 4000 --kills 12 --out runs/soak/soak.json

report: $(STAMP) ## tables, plots and one page of everything below runs/
	$(BIN)/python -m src.report runs=[runs] out=report

test: $(STAMP) ## the tests, about 15 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

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
