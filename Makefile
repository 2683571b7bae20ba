# The two commands of the README are `make train` and `make test`; each sets up its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what it imports as it goes; all 20,000 files at once take a minute and a half.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: train test check lint types floors docs bench clean

train: $(VENV)/installed
	$(BIN)/lamina train $(ARGS)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: lint types floors test

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/codespell src docs benchmarks recipes README.md

types: $(VENV)/installed-dev
	$(BIN)/mypy

floors: $(VENV)/installed-dev
	$(BIN)/lint-imports

docs: $(VENV)/installed-dev
	$(BIN)/python docs/generate.py && NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/installed-dev
	$(PIP) -e ".[bench]" && $(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[dev]"
	touch $(VENV)/installed $@
