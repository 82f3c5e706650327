# make setup | train | test | check | docs: everything runs in .venv, which `setup` makes from PYTHON and TORCH.
# make wheel | wheel-check | matrix: what users get, and where it runs (docs/matrix.md).
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Where `matrix` and `wheel-check` keep their environments: 1 GB each, 5 GB with a CUDA build of torch.
ENVS   ?= build/envs

# What to train: any name that `.venv/bin/d2r presets` prints, or the path of a run's config.json.
PRESET ?= quick
ARGS   ?=
# Processes that share the tests, a file each at a time.
JOBS   ?= logical

.PHONY: setup train test check docs wheel wheel-check matrix clean

setup: $(STAMP)

# Editable, so that a change to a Python file needs no new install.
$(STAMP): setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)" -e '.[dev]' -c constraints.txt
	touch $@

train: setup
	$(BIN)/d2r train $(PRESET) $(ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# mypy looks at the package as it is installed, kernels/ as d2r_fast.kernels: of an editable install it sees but the one.
check: setup
	$(BIN)/ruff check d2r_fast kernels tests benches examples setup.py
	$(BIN)/ruff format --check d2r_fast kernels tests benches examples setup.py
	rm -rf build/types && mkdir -p build/types && cp -rL d2r_fast build/types && cp -r kernels build/types/d2r_fast
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# The pages of docs/ as a site that works from its folder; builds without a network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo build/site/index.html

# For any Python from 3.11 and any torch from 2.11. Without a compiler there is none: it would be named -any.whl.
wheel:
	rm -rf dist build/lib.* build/bdist.*
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	ls dist/*-py3-none-linux_*.whl

# That wheel in a fresh environment without the checkout.
wheel-check:
	bash tools/wheel_check.sh $(PYTHON) $(TORCH) $(ENVS)

# All tests on one Python and one torch, against the package as pip installs it.
matrix:
	bash tools/matrix.sh $(PYTHON) $(TORCH) $(ENVS) --numprocesses $(JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info
