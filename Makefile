# Two commands: `make train` trains the built-in quickstart, `make test` runs every test.
# PYTHON=python3.12 chooses the interpreter; TORCH=system uses the torch this machine already has.

PYTHON ?= python3
TORCH ?= auto
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test lint bench clean

train: $(VENV)/.installed
	$(BIN)/fastsft train

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m bench.data
	$(BIN)/python -m bench.cpu_training

$(VENV)/.installed: pyproject.toml setup.py constraints.txt tools/install.sh
	PYTHON=$(PYTHON) TORCH=$(TORCH) sh tools/install.sh $(VENV) .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	PYTHON=$(PYTHON) TORCH=$(TORCH) sh tools/install.sh $(VENV) '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
