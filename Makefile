# The two set-up commands: `make demo` and `make test`. Each makes the environment first where there is none.
# `make slow`: the tests of more than six seconds each, and those that download a model.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Test files run beside each other, one a process.
WORKERS ?= 2
STAMP  := $(VENV)/.installed

.PHONY: demo test slow check lint types clean bench

demo: $(STAMP)
	$(BIN)/probe demo

test: $(STAMP) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope -m slow

check: test slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	@echo "see benchmarks/README.md for what each script measures"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
