# make setup | train | test | check. Everything runs in .venv, which `setup` makes from PYTHON.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# What to train: any name that `.venv/bin/d2r presets` prints, or the path of a run's config.json.
PRESET ?= quick
ARGS   ?=

.PHONY: setup train test check clean

setup: $(STAMP)

# Editable, so that a change to a Python file needs no new install. Build isolation is off because
# an isolated build environment would download a second torch; csrc/ is built against the one installed here.
$(STAMP): setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel cmake -c constraints.txt
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]' -c constraints.txt
	touch $@

train: setup
	$(BIN)/d2r train $(PRESET) $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff check d2r_fast kernels tests benches setup.py
	$(BIN)/ruff format --check d2r_fast kernels tests benches setup.py
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
