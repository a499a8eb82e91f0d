# make demo   sets up .venv and makes a video from a prompt
# make test   sets up .venv and runs linter, type checker and all tests

PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint clean

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

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
