# make demo   sets up .venv and makes a video from a prompt
# make check  sets up .venv and runs linter, type checker and the fast tests: no clusters, no gangs of processes
# make test   the same with all tests: the slow ones two at a time, then those that bear no neighbour one by one

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo check test lint clean

.venv/.base: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/.base
	$(BIN)/flowcache generate "a red circle moving right" --model magi-pocket --seconds 4 --seed 0 --out demo.mp4

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations 12 -m "slow and not alone"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m alone

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
