# Everything a person types. `make help` lists it from the comments after `##`.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PORT ?= 5000
HOST ?= 127.0.0.1
MLFLOW_DIR ?= outputs
MLFLOW_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the tests: as many as there are CPUs, none of its own for a few chosen tests.
WORKERS ?= $(if $(filter -k% tests/%,$(PYTEST_ARGS)),0,logical)
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8

# Nothing here reports home, and MLflow's telemetry has a race that loses points.
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export HF_HUB_DISABLE_TELEMETRY := 1
# A process of the server that nothing here needs.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false

.PHONY: help setup assets demo demo-refusal report status logs retry cancel prefetch test test-fast \
	check format format-check lint types docs bench bench-compare mlflow sync clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
		| awk -F ':.*## ' '{printf "  \033[36mmake %-14s\033[0m %s\n", $$1, $$2}'

setup: $(STAMP) ## install into .venv (PYTHON=python3.12 for another Python)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) \
		|| { echo "cannot make $(VENV); on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade pip -c constraints.txt
	@echo "installing into $(VENV): a minute or two the first time"
	@# Python compiles what it imports by itself; compiling every file here takes longer.
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -e '.[dev,docs,lm-eval,wandb]' \
		-c constraints.txt
	@touch $@

assets: setup ## fetch model and data into CRL_EXP_CACHE
	@$(BIN)/python -m crl_exp assets

demo: assets ## steer a real model on movie reviews, by method and layer
	$(BIN)/python launch.py -m +sweep=demo
	$(BIN)/python -m crl_exp report demo

demo-refusal: assets ## the second task: refusals of harmful and harmless prompts
	$(BIN)/python launch.py -m +sweep=demo_refusal
	$(BIN)/python -m crl_exp report demo_refusal

report: setup ## tables, figures and a page of a sweep, also in MLflow (SWEEP=demo)
	@test -n "$(SWEEP)" || { echo "which sweep? make report SWEEP=demo"; exit 1; }
	$(BIN)/python -m crl_exp report $(SWEEP)

status: setup ## state, progress and time left of a sweep's runs (SWEEP=demo WATCH=1)
	@test -n "$(SWEEP)" || { echo "which sweep? make status SWEEP=demo"; exit 1; }
	@$(BIN)/python -m crl_exp status $(SWEEP) $(if $(WATCH),--watch)

logs: setup ## what a run's job printed, and why it ended (RUN=its key)
	@test -n "$(RUN)" || { echo "which run? make logs RUN=KEY; make status lists them"; exit 1; }
	@$(BIN)/python -m crl_exp logs $(RUN)

retry: setup ## start a sweep's failed, lost and cancelled runs again (SWEEP=name SET='mem=64GB')
	@test -n "$(SWEEP)" || { echo "which sweep? make retry SWEEP=layerwise"; exit 1; }
	$(BIN)/python -m crl_exp retry $(SWEEP) $(SET)

cancel: setup ## end a sweep's queued and running runs, saved (SWEEP=name)
	@test -n "$(SWEEP)" || { echo "which sweep? make cancel SWEEP=layerwise"; exit 1; }
	$(BIN)/python -m crl_exp cancel $(SWEEP)

prefetch: setup ## download what a sweep loads, for offline nodes (SWEEP=name ARGS='model=…')
	@test -n "$(SWEEP)" || { echo "which sweep? make prefetch SWEEP=layerwise"; exit 1; }
	$(BIN)/python -m crl_exp prefetch +sweep=$(SWEEP) $(ARGS)

test: assets ## every test that can run here (PYTEST_ARGS='-k name')
	$(PYTEST) $(PYTEST_ARGS)

test-fast: setup ## the quick tests that need neither network nor assets
	$(PYTEST) -m 'not slow and not assets and not gpu and not slurm' $(PYTEST_ARGS)

check: format-check lint types test-fast ## what must pass before a commit

format: setup ## rewrite the code in the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --exit-zero --quiet .

format-check: setup ## fail if `make format` would change a file
	$(BIN)/ruff format --check .

lint: setup ## ruff's rules, which way imports go, and that what is imported is declared
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m deptry --no-ansi .

docs: setup ## the docs as a site that needs no network, build/site/index.html
	@# Not --quiet, under which no warning counts.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

types: setup ## the type checker
	$(BIN)/pyright

bench: assets ## measure speed and memory
	$(BIN)/python -m crl_exp bench

bench-compare: assets ## measure speed by another commit's code as well (BASE=HEAD~1 ONLY="update startup")
	$(BIN)/python -m crl_exp bench --against $(or $(BASE),HEAD~1) $(if $(ONLY),--only $(ONLY))

mlflow: setup ## compare runs in the browser, on loopback (PORT=5000); docs/mlflow.md
	@mkdir -p "$(MLFLOW_DIR)"
	@echo "open http://$(HOST):$(PORT)/#/experiments/1/runs?workflowType=machine_learning"
	$(BIN)/mlflow server --host $(HOST) --port $(PORT) \
		--backend-store-uri "sqlite:///$(abspath $(MLFLOW_DIR))/mlflow.db" \
		--artifacts-destination "$(abspath $(MLFLOW_DIR))/mlartifacts" $(MLFLOW_ARGS)

sync: setup ## bring MLflow up to date with a sweep's run directories (SWEEP=demo)
	@test -n "$(SWEEP)" || { echo "which sweep? make sync SWEEP=demo"; exit 1; }
	$(BIN)/python -m crl_exp sync $(SWEEP)

clean: ## remove caches; results, .venv and assets stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
