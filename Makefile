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

# Each benchmark prints JSON into benchmarks/out; one that is there and newer than its script is not run again. One that
# fails does not stop the others. Last, the table of figures in RESULTS.md is brought up to date with what is there.
# make bench BENCH="scoring lowering" runs some alone. Never in parallel: they measure time.
OUT     := benchmarks/out
SCRIPTS := $(filter-out calibrate_%,$(notdir $(basename $(wildcard benchmarks/*.py))))
BENCH   ?= $(SCRIPTS) mixed_precision-tuned prune_accuracy-v1 prune_accuracy-pixel1 prune_latency-pixel1 qat_step-memory

bench: $(STAMP)
	@mkdir -p $(OUT) && rm -f $(OUT)/failed
	@$(MAKE) --no-print-directory -j1 -k $(BENCH:%=$(OUT)/%.json) || touch $(OUT)/failed
	@PYTHONPATH=benchmarks $(BIN)/python -m figures
	@[ ! -e $(OUT)/failed ]

# Options of benchmarks that have to be given some, and of those that are run again with others, under a second name.
# Those that go on where they were stopped keep what they have until they end.
PARTS     = $(@:.json=.parts)
ALL_PARTS = --parts $(PARTS)/all.jsonl
$(OUT)/mixed_precision.json:       ARGUMENTS = --trials 1 $(ALL_PARTS)
$(OUT)/mixed_precision-tuned.json: ARGUMENTS = --trials 1 --bits 4 --costs zynq7020:latency,vu9p:latency --tune 0.5 \
                                               --rate 0.005 $(ALL_PARTS)
$(OUT)/nas_search.json:            ARGUMENTS = $(ALL_PARTS)
$(OUT)/prune_accuracy.json:        ARGUMENTS = --engines ddpg --trials 40 $(ALL_PARTS)
$(OUT)/prune_accuracy-v1.json:     ARGUMENTS = --network mobilenet_v1 --recovery batch-norm $(ALL_PARTS)
$(OUT)/prune_accuracy-pixel1.json: ARGUMENTS = --metric latency --round-to 1 --seeds 0 --engines ddpg --trials 40 \
                                               --tune-epochs 0 --speed $(ALL_PARTS)
$(OUT)/prune_latency-pixel1.json:  ARGUMENTS = --target pixel1
$(OUT)/qat_step-memory.json:       ARGUMENTS = --keep-memory
$(OUT)/sparsify_accuracy.json:     ARGUMENTS = --seeds 3
$(OUT)/specialization.json:        ARGUMENTS = --bits 4 $(ALL_PARTS)
$(OUT)/three_passes.json:          ARGUMENTS = --work $(PARTS)/work $(ALL_PARTS)
$(OUT)/transfer.json:              ARGUMENTS = --bits 4 --judged 256 --episodes 150 --folder $(PARTS)

.SECONDEXPANSION:
$(OUT)/%.json: benchmarks/$$(firstword $$(subst -, ,$$*)).py | $(STAMP)
	@echo "$*" >&2
	@[ ! $< -nt $(PARTS) ] || rm -rf $(PARTS)
	@mkdir -p $(PARTS)
	@$(BIN)/python $< $(ARGUMENTS) > $@.part && mv $@.part $@ && rm -rf $(PARTS)

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
