# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv and install pinned versions first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test lint types clean help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

quickstart: $(VENV)/installed  ## the whole pipeline on the embedded tiny pair, no network, no GPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 $(BIN)/distill run recipes/quickstart.yaml

test: $(VENV)/installed-dev  ## the tests; the slow ones too where CI is set
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(if $(CI),not nightly,not slow and not nightly)"

lint: $(VENV)/installed-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev  ## mypy, strict
	$(BIN)/mypy

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs

# torch first and pinned: a bare `torch` of another package's choosing can bring several GB of another build.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e '.[dev,qlora,serve,benchmarks]'
	touch $@
