# Every target sets itself up: `make serve` or `make test` on a fresh clone is enough.
# Set-up runs again only when pyproject.toml or a file in requirements/ changes.

PYTHON ?= python3
PORT   ?= 8000
MODEL  ?=
ARGS   ?=
# Of `make soak`: part of the full counts, seeds of the simulation, how much longer state machines run, and the first seed.
SCALE ?= 1
SEEDS ?= 10000
DEPTH ?= 35
SEED  ?= $(shell date +%Y%m%d)
# Test processes side by side; WORKERS=0 runs the tests in one, for a debugger.
WORKERS ?= 2
# What pip installs as PyTorch, before everything else. TORCH= (empty) keeps the torch that VENV_ARGS brings:
#   make venv VENV_ARGS=--system-site-packages TORCH=
TORCH     ?= -r requirements/torch.txt
VENV_ARGS ?=

VENV    := .venv
BIN     := $(VENV)/bin
RUNTIME := $(VENV)/.ready
BROWSER := $(VENV)/.ready-browser
TOOLS   := $(VENV)/.ready-tools
CLUSTER := $(VENV)/.ready-cluster
OPERATIONS := $(VENV)/.ready-operations
CLIENTS := $(patsubst requirements/clients-%.txt,.venv-clients/%/.ready,$(wildcard requirements/clients-*.txt))
NODE    := tests/clients/real/node/node_modules/.ready
PIP     := $(BIN)/pip --disable-pip-version-check install --quiet

# Some containers ask for no bytecode; then every process of a test compiles everything again, pytest's rewritten plugins too.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv serve test test-browser test-gpu test-operations test-cluster test-clients soak check format bench docs screenshots lock wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Settings: PORT=$(PORT) MODEL=<name or folder> ARGS='<more flags>' PYTHON=$(PYTHON)"

serve: $(RUNTIME) ## start the server with the model in the box (MODEL=... for another)
	@exec $(BIN)/sightline serve $(MODEL) --port $(PORT) $(ARGS)

test: $(TOOLS) ## run every test that needs no GPU and no browser
	@$(BIN)/python -m pytest -q --ignore=tests/gpu --ignore=tests/cluster --ignore=tests/browser --ignore=tests/operations --ignore=tests/clients/real -n $(WORKERS) --dist worksteal $(ARGS)

test-browser: $(BROWSER) ## drive the playground in headless Chromium (installs it where it can)
	@$(BIN)/python -m pytest -q tests/browser $(ARGS)

test-gpu: $(TOOLS) ## run the tests that need a CUDA device (skipped, with the reason, without one)
	@$(BIN)/python -m pytest -q tests/gpu tests/kernels $(ARGS)

test-operations: $(OPERATIONS) ## scrape a server with a real Prometheus, try dashboard, alerts and deploy/ (installs it where it can)
	@scripts/install_system.sh test-operations prometheus prometheus
	@$(BIN)/python -m pytest -q -n 0 tests/operations $(ARGS)

test-cluster: $(CLUSTER) ## run the tests of many machines on a local Ray cluster, about three minutes
	@$(BIN)/python -m pytest -q -n 0 tests/cluster $(ARGS)

test-clients: $(TOOLS) $(CLIENTS) $(NODE) ## run other people's clients and load tools against a server (installs them, with npm)
	@$(BIN)/python -m pytest -q -n 0 tests/clients/real $(ARGS)

soak: $(TOOLS) ## run the reliability tests at their full counts (SCALE=0.1 for less), hours; writes docs/reliability.md
	@RELIABILITY_SCALE=$(SCALE) RELIABILITY_SEED=$(SEED) RELIABILITY_REPORT=.pytest_cache/reliability.json \
	  SIMULATION_SEEDS=$(SEEDS) SIMULATION_FIRST=$(SEED) TEST_DEPTH=$(DEPTH) \
	  $(BIN)/python -m pytest -q --timeout=0 tests/reliability tests/engine/test_simulation.py tests/cache \
	    tests/engine/test_grammar.py tests/prompt/test_grammar.py; \
	  status=$$?; $(BIN)/python scripts/write_reliability.py .pytest_cache/reliability.json && exit $$status

check: $(TOOLS) ## lint, format, types and the import ladder
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(TOOLS) ## fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(TOOLS) ## measure sightline beside transformers generate on this CPU
	@$(BIN)/python -m sightline.bench.compare $(ARGS)

docs: $(TOOLS) ## write the pages of docs/ that are made from the code, and all of them as a site into site/
	@$(BIN)/python scripts/write_docs.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "site/index.html is the documentation"

wheel: $(TOOLS) ## build the wheel into dist/
	@$(BIN)/pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist .
	@ls -l dist

venv: $(TOOLS) ## make .venv with the tested versions of everything

screenshots: $(BROWSER) ## take the pictures of docs/playground.md again
	@$(BIN)/python -m scripts.write_screenshots

lock: $(TOOLS) ## write requirements/tested.txt from what .venv has now
	@{ echo "# Versions that the tests ran with: a constraints file for pip, written by 'make lock' from .venv."; \
	  $(BIN)/pip freeze --exclude-editable | grep -ivE '^(torch|nvidia-.*|triton|cuda-.*|sightline)(==| @)'; } \
	  > requirements/tested.txt.new && mv requirements/tested.txt.new requirements/tested.txt
	@wc -l requirements/tested.txt

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) .venv-clients tests/clients/real/node/node_modules dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sightline needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV_ARGS) $(VENV)

$(RUNTIME): pyproject.toml requirements/torch.txt requirements/tested.txt | $(BIN)/python
	@echo "Installing sightline into $(VENV) ..."
	$(if $(strip $(TORCH)),@$(PIP) $(TORCH))
	@$(PIP) --constraint requirements/tested.txt --editable .
	@touch $@

$(TOOLS): $(RUNTIME)
	@echo "Installing what the tests and checks need ..."
	@$(PIP) --constraint requirements/tested.txt --editable '.[test,dev]'
	@touch $@

$(BROWSER): $(TOOLS)
	@scripts/install_system.sh test-browser "chromium fonts-dejavu-core" chromium chromium-browser google-chrome
	@$(PIP) --constraint requirements/tested.txt --editable '.[browser]'
	@touch $@

$(OPERATIONS): $(TOOLS)
	@echo "Installing Kubernetes' schemas ..."
	@$(PIP) --constraint requirements/tested.txt --editable '.[operations]'
	@touch $@

$(CLUSTER): $(TOOLS)
	@echo "Installing Ray ..."
	@$(PIP) --constraint requirements/tested.txt --editable '.[ray]'
	@touch $@

.venv-clients/%/.ready: requirements/clients-%.txt | $(BIN)/python
	@echo "Installing $< into .venv-clients/$* ..."
	@$(PYTHON) -m venv .venv-clients/$*
	@.venv-clients/$*/bin/pip --disable-pip-version-check install --quiet --no-deps --no-compile --requirement $<
	@touch $@

$(NODE): tests/clients/real/node/package-lock.json
	@command -v npm > /dev/null || { echo "npm is missing: install Node.js 20 or newer"; exit 1; }
	@echo "Installing the clients of Node.js ..."
	@npm --prefix tests/clients/real/node ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@
