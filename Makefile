# make run    boot the default Debian guest (ends in its shell on a terminal)
# make test   unit and boot tests
# make bench  timings against QEMU, the host itself and Unicorn
# make lint   ruff and mypy
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test bench lint clean
.DEFAULT_GOAL := run

run: $(VENV)/installed
	@$(BIN)/trivisor run

test: $(VENV)/installed-dev
	$(BIN)/pytest -q

bench: $(VENV)/installed-bench
	$(BIN)/python -m bench

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# What is installed follows pyproject.toml; the package itself is used in place, and compiled once here, since an
# environment may keep Python from doing so when it runs.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@$(BIN)/python -m compileall -q src
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python -m compileall -q src
	@touch $@ $(VENV)/installed

# Unicorn is one more to compare with; without it the benchmarks say so.
$(VENV)/installed-bench: $(VENV)/installed-dev
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

# Debian ships venv's pip apart from python3, in python3-venv.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "trivisor: Python 3.11 or newer is needed (make PYTHON=...)" >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null; \
		else \
			echo "trivisor: python3-venv is missing; install it (apt-get install python3-venv) and run make again" >&2; \
			exit 1; \
		fi; \
	fi
	@rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
