# Two commands: `make train` trains the built-in quickstart, `make test` runs every test.
# PYTHON=python3.12 chooses the interpreter; TORCH=system uses the torch this machine already has.

PYTHON ?= python3
TORCH ?= auto
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test lint bench gpu static clean

train: $(VENV)/.installed
	$(BIN)/fastsft train

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/python -m pytest bench/kernels
	$(BIN)/python -m bench.all

# Every kernel checked, then timed against its peers; the README's tables from the rows.
gpu: $(VENV)/.installed-test
	$(BIN)/python -m bench.gpu
	$(BIN)/python -m bench.engine
	$(BIN)/python -m bench.report

# Every kernel compiled for six targets, by the installed Triton and by 3.6 where pip can get it.
static: $(VENV)/.installed-test
	$(BIN)/python -m bench.static
	if $(BIN)/python -m pip install -q --no-deps --target build/triton-3.6 --upgrade triton==3.6.0; \
	then PYTHONPATH=build/triton-3.6 $(BIN)/python -m bench.static; \
	else echo "pip cannot get Triton 3.6.0 here: its report is left out"; fi
	$(BIN)/python -m bench.report

$(VENV)/.installed: pyproject.toml setup.py constraints.txt tools/install.sh
	PYTHON=$(PYTHON) TORCH=$(TORCH) sh tools/install.sh $(VENV) .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	PYTHON=$(PYTHON) TORCH=$(TORCH) sh tools/install.sh $(VENV) '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
