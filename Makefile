# `make demo` and `make test` need Linux and Python 3.11 or 3.12 with pip and venv; the rest they install.
PYTHON ?= python3
CUDA ?= cuda13
VENV := .venv
BIN := $(VENV)/bin
# Several processes share the cores: threads that spin while they wait take them from each other.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-all check format bench peers install clean

demo: install  ## The whole way on the example clips: shard, train, evaluate, report
	$(BIN)/alpro demo

test: install  ## The tests CI runs
	$(BIN)/python -m pytest

test-all: install  ## Also the slow ones: kills, soaks, several nodes
	$(BIN)/python -m pytest -m ""

check: install  ## Style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## All benchmarks, and the README's table (wants `make demo` and `make peers` before, and ffmpeg)
	$(BIN)/alpro bench all --json benchmarks/results
	$(BIN)/python benchmarks/readme.py

peers: benchmarks/peers/.venv/installed  ## The libraries that the stream is compared with, in an environment of their own

benchmarks/peers/.venv/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv benchmarks/peers/.venv
	benchmarks/peers/.venv/bin/pip install --quiet --upgrade pip
	benchmarks/peers/.venv/bin/pip install --quiet --requirement $<
	touch $@

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(CUDA),dev]'
	touch $@

clean:  ## Removes caches and the demo's results; not the environment
	rm -rf runs/demo .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
