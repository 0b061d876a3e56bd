# make demo | test | test-debug | lint | format | bench | docs | build | clean
# Needs python3 (3.11 or newer for the pinned versions), a C compiler and a package registry for the first run.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP   := $(VENV)/.fxopt-installed
CYTHON  := $(shell find targets fxopt/graph -name '*.pyx' -o -name '*.pxd')
WORKERS ?= 2

# cython-lint starts pycodestyle by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-debug lint format bench docs build clean

help:
	@sed -n '1,2s/^# //p' Makefile

setup: $(STAMP)

# No build isolation: the extension is compiled with the pinned Cython, and nothing is installed twice.
# pytorchcv holds real architectures for the tests; its own requirements would replace torch.
$(STAMP): pyproject.toml setup.py constraints.txt $(CYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools Cython
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,lint]'
	$(PIP) install -c constraints.txt requests
	$(PIP) install -c constraints.txt --no-deps pytorchcv
	touch $@

demo: $(STAMP)
	$(BIN)/fxopt demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The same tests of the compiled code with bounds checks in it; the next target compiles it without them again.
test-debug: $(STAMP)
	rm -f $(STAMP)
	FXOPT_CYTHON_DEBUG=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pytest -q tests/targets tests/graph/test_hold.py $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/cython-lint targets fxopt/graph
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@set -e; for script in $(filter-out benchmarks/calibrate_%,$(wildcard benchmarks/*.py)); do echo "$$script" >&2; $(BIN)/python $$script; done

docs: $(STAMP)
	$(PIP) install -c constraints.txt mkdocs mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: $(STAMP)
	$(PIP) install -c constraints.txt build
	$(BIN)/python -m build

clean:
	rm -rf build dist site demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find fxopt/ passes targets tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
	find targets fxopt/graph -name '*.so' -delete
	rm -f $(STAMP)
