# Needs make and Python 3.11 or newer with venv; everything else is installed into .venv.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
ZOO := $(VENV)/zoo
ZOO_STAMP := $(ZOO)/.installed
PYTEST := $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15
SOURCES := $(wildcard lightning_subnet tests examples benchmarks docs conftest.py)

.DEFAULT_GOAL := help
.PHONY: help install install-zoo demo test test-slow test-zoo test-all lint stubs types docs bench clean

help: ## Show this help
	@echo "Usage: make TARGET [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | while IFS='|' read -r name text; do printf '  %-11s %s\n' "$$name" "$$text"; done

install: $(STAMP) ## Create .venv with the package and its development tools (pinned)

install-zoo: $(ZOO_STAMP) ## Create .venv/zoo, which has timm and transformers too (pinned)

demo: $(STAMP) ## Search a small elastic network on real handwritten digits, into demo_output/
	$(PY) examples/digits_search.py

test: $(STAMP) ## Run the tests and the doctests but the slow ones, on two cores
	$(PYTEST) -m "not slow"

test-slow: $(STAMP) ## Run the slow tests: examples, storms of kills, long reruns
	$(PYTEST) -m slow

test-zoo: $(ZOO_STAMP) ## Run the tests with networks of timm and transformers
	$(ZOO)/bin/python -m pytest -n 2 --dist loadgroup --durations 15 tests/zoo

test-all: test test-slow test-zoo ## Run all tests

lint: $(STAMP) ## Check style, formatting and the floors of the packages
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)
	$(BIN)/lint-imports --no-cache

stubs: $(STAMP) ## Write what is made from the code: stubs of public names, the picture in ARCHITECTURE.md
	$(PY) -m tests.stubs
	$(PY) -m tests.architecture

types: $(STAMP) ## Check types (mypy, strict)
	$(PY) -m mypy

docs: $(STAMP) ## Build the documentation into docs/_build/html (the tests run its examples)
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(STAMP) ## Run what is missing of the search efficiency benchmark (hours), and print it
	$(PY) -m benchmarks.search_efficiency

clean: ## Remove what the targets wrote, .venv excepted
	rm -rf build dist demo_output docs/_build lightning_logs htmlcov .coverage
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .grimp_cache .import_linter_cache
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp goes first and comes back last, so that an interrupted install is repeated.
# A .venv without a working pip, left by an interruption or another Python, is built anew.
$(STAMP): pyproject.toml constraints.txt tests/oracles.txt
	@rm -f $@
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: no '$(PYTHON)' found; install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version) is too old; Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' has no working venv module; install it (on Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
	@$(PY) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs,onnx,openvino]'
	# The parity tests' oracle: kept apart, as its torchvision has no operators for a CPU build of torch.
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(VENV)/oracles -r tests/oracles.txt
	@touch $@

# Apart from .venv, so that the package itself is tested without these libraries.
$(ZOO_STAMP): $(STAMP) constraints-zoo.txt tests/zoo/requirements.txt
	@rm -f $@
	@$(ZOO)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || $(PY) -m venv --clear $(ZOO)
	$(ZOO)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -c constraints-zoo.txt -e '.[onnx]' -r tests/zoo/requirements.txt
	@touch $@
