# make demo   sets up .venv and makes a video from a prompt
# make check  sets up .venv and runs linter, type checker and the fast tests: no clusters, no gangs of processes
# make test   the same with all tests, four at a time, then those that bear no neighbour one by one

PYTHON ?= python3.11
BIN := .venv/bin
BY_FILE := --dist loadfile --no-loadscope-reorder  # as tests/conftest.py orders them

# Tests start hundreds of processes: what one of them compiles serves the next, also where the caller's environment
# keeps Python from writing it down.
export PYTHONDONTWRITEBYTECODE =
export OMP_NUM_THREADS = 1

.PHONY: demo check test lint fast all clean

.venv/.base: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/.base
	$(BIN)/flowcache generate "a red circle moving right" --model magi-pocket --seconds 4 --seed 9 --out demo.mp4

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

fast: .venv/.dev
	$(BIN)/python -m pytest -n auto $(BY_FILE) -m "not slow"

check: .venv/.dev
	$(MAKE) -j 2 lint fast

all: .venv/.dev
	$(BIN)/python -m pytest -n 4 $(BY_FILE) --durations 12 -m "not alone"
	$(BIN)/python -m pytest -m alone

test: .venv/.dev
	$(MAKE) -j 2 lint all

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
