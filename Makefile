# Everything runs in .venv, which is made on first use from the first Python >= 3.10 found, with the versions of constraints.txt.
# PIP_ARGS are handed to pip: on a machine without a GPU, the option that finds the much smaller CPU build of torch.
.PHONY: help demo test check-all fuzz bench lint clean
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_ARGS ?=
JOBS ?= 2
N ?= 2000
ARGS ?=

help:
	@echo "make demo       train a digits classifier whose layers are tdsl functions (CPU or GPU, under a minute)"
	@echo "make test       ruff, mypy --strict, pytest"
	@echo "make check-all  compile every kernel of the corpus for every target, no GPU needed"
	@echo "make fuzz N=..  the property tests with N examples each"
	@echo "make bench      the benchmark table (ARGS=\"overhead\", ARGS=\"--help\", ..)"
	@echo "make lint       ruff and mypy --strict"
	@echo "make clean      remove .venv and the caches"

$(STAMP): pyproject.toml constraints.txt
	@for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "make: no Python >= 3.10 with the venv module was found" >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$($$found --version)"; \
	$$found -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/digits.py $(ARGS)

test: lint
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

check-all: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --all-targets -m check_all $(ARGS)

fuzz: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) -m fuzz --fuzz $(N) $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy --strict tdsl lowering

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .gpu-site build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
