# Two commands: `make run` serves, `make test` checks everything. All else is in the README.

VENV  := .venv
BIN   := $(VENV)/bin
ARGS  ?=
PYTEST_ARGS ?=
MINUTES ?= 10

# The build of torch. Without TORCH_INDEX the CPU builds are taken where their index answers within 3 s,
# else whatever pip is configured to use. For CUDA:
#   make run TORCH_INDEX=https://download.pytorch.org/whl/cu126
TORCH       ?= torch==2.13.0
TORCH_INDEX ?=
CPU_INDEX   := https://download.pytorch.org/whl/cpu

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

# Evaluated only when .venv must be made: the first Python that is new enough and can make one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: help run setup check test simulate simulate-plants mutate bench chaos fuzz degrees parity compose-up compose-down clean FORCE
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

run: $(VENV)/.run ## Install what is missing, fetch the default model, serve it (ARGS="--decode 2" passes flags)
	@exec $(BIN)/kvferry up $(ARGS)

setup: $(VENV)/.dev ## Install everything that tests and benchmarks need, the default model included
	@$(BIN)/kvferry model fetch smollm2

check: $(VENV)/.dev ## Lint, types, layer contracts: seconds, no network
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# These tests leave each other alone, so that they share the machine's cores. The others start whole stacks and
# judge how long they take: one at a time.
TOGETHER := tests/unit/ tests/contract/ tests/fuzz/ tests/simulation/ tests/native/
APART    := $(filter-out $(TOGETHER),$(wildcard tests/*/))

test: check ## Everything: check, then unit, contract, integration and end-to-end tests
	@model=$$($(BIN)/kvferry model fetch smollm2) && export KVFERRY_TEST_MODEL="$$model" || exit 1; \
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadgroup $(APART:%=--ignore=%) $(PYTEST_ARGS); first=$$?; \
	$(BIN)/python -m pytest $(TOGETHER:%=--ignore=%) $(PYTEST_ARGS); \
	case "$$first $$?" in "0 0" | "0 5" | "5 0") ;; *) exit 1 ;; esac  # 5: PYTEST_ARGS chose none of these

SEEDS     ?= 500
FIRST     ?= 0
# Without OMP_NUM_THREADS, to which nproc would bow.
PROCESSES ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)

simulate: $(VENV)/.dev ## Whole clusters on a virtual clock under drawn faults (SEEDS=5000 FIRST=0 PROCESSES=2 RECORD=FILE: goes on with it)
	$(BIN)/python tests/simulation sweep --seeds $(SEEDS) --first $(FIRST) --processes $(PROCESSES) \
		$(if $(RECORD),--record $(RECORD))

simulate-plants: $(VENV)/.dev ## Look for the seeds that find planted bugs; the tests replay them
	$(BIN)/python tests/simulation plants --processes $(PROCESSES)

mutate: $(VENV)/.dev ## Plant one-line bugs by chance, and list what neither tests nor simulation notice
	$(BIN)/python tests/simulation mutate --processes $(PROCESSES) $(ARGS)

bench: $(VENV)/.dev ## Measure on this machine and print the figures
	@model=$$($(BIN)/kvferry model fetch smollm2) && \
		KVFERRY_TEST_MODEL="$$model" $(BIN)/python -m bench $(ARGS)

chaos: $(VENV)/.dev ## Kill, freeze and restart parts of a real stack under load for MINUTES=10, and judge every token
	@model=$$($(BIN)/kvferry model fetch smollm2) && \
		KVFERRY_TEST_MODEL="$$model" $(BIN)/python -m bench chaos --minutes $(MINUTES) $(ARGS)

fuzz: $(VENV)/.dev ## 100,000 random and mutated bodies, messages and frames (ARGS="--plane http --batch 7" repeats one)
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

degrees: $(VENV)/.dev ## Whole stacks whose prefill and decode workers have 1, 2 and 4 ranks, all pairs
	@model=$$($(BIN)/kvferry model fetch smollm2) && KVFERRY_ALL_DEGREES=1 KVFERRY_TEST_MODEL="$$model" \
		$(BIN)/python -m pytest tests/e2e/test_tensor_parallel.py $(ARGS)

parity: $(VENV)/.dev ## Every feature of the API over every way through a cluster, failover in each; writes docs/parity.md
	@PYTHONPATH=tests $(BIN)/python tests/parity_page.py

compose-up: ## The stack in containers, built if need be (ARGS="--scale prefill=2 --scale decode=3")
	docker compose up --build --detach --wait $(ARGS)

compose-down: ## Drain and stop it (ARGS=--volumes also forgets the model and the secrets)
	COMPOSE_PROFILES='*' docker compose down --remove-orphans $(ARGS)

clean: ## Remove what was installed and built here (not the fetched model)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Stamps are written last, so that an interrupted step is done again and a finished one needs no network.

$(VENV)/.made:
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.11 or newer with venv was found; set PYTHON=…' >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	@touch $@

# Another index or version than the installed one's, asked for by name: install again.
ifneq ($(TORCH_INDEX),)
ifneq ($(TORCH_INDEX) $(TORCH),$(shell cat $(VENV)/.torch 2>/dev/null))
$(VENV)/.torch: FORCE
endif
endif

PROBE = import signal, urllib.request; signal.alarm(3); urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=3)

$(VENV)/.torch: $(VENV)/.made
	@index='$(TORCH_INDEX)'; again=; \
	if [ -n "$$index" ]; then $(BIN)/python -c 'import torch' 2>/dev/null && again=--force-reinstall; \
	elif $(BIN)/python -c '$(PROBE)' >/dev/null 2>&1; then index='$(CPU_INDEX)'; fi; \
	echo "installing $(TORCH) from $${index:-the configured package sources}"; \
	$(PIP) install $$again $${index:+--index-url "$$index"} '$(TORCH)'
	@echo '$(TORCH_INDEX) $(TORCH)' > $@

$(VENV)/.run: pyproject.toml $(VENV)/.torch
	$(PIP) install --editable '.[all]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) install --editable '.[dev]'
	@touch $(VENV)/.run $@
