# make run   install everything into .venv and start Lectern on this machine
# make test  the same .venv, then style, types and every test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: run test test-all test-gpu soak lint format clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Lectern needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Call make with PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Lectern and its pinned dependencies into $(VENV) (about 2 GB, once)"
	$(PIP) install --quiet --progress-bar on -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	@touch $@

run: $(VENV)/.installed
	$(BIN)/lectern up

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two files of tests at a time; the driver's branches are counted, as it must be right everywhere.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=30 \
	    --cov=serving/driver --cov-branch --cov-report=term --cov-fail-under=95

test-all: lint
	$(BIN)/python -m pytest -m 'not gpu'

test-gpu:
	$(PYTHON) -m pytest -m gpu

soak: $(VENV)/.installed-test
	$(BIN)/python -m tests.soak.gateway

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
