# make demo   see it work          make test   lint, types, tests
# The first of either sets everything up in .venv; `make clean` forgets it.
# Another interpreter: make clean && make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
# A process on each core; of more than 4, each loads torch anew for little to do.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal
SETUP := pyproject.toml scripts/setup.sh scripts/install-ffcv.sh

.PHONY: demo test test-slow lint clean

demo: .venv/.ready
	$(BIN)/kdcache demo

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-slow: .venv/.ready-dev
	$(PYTEST) -m "slow and not gpu"

lint: .venv/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check -q
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: $(SETUP)
	PYTHON="$(PYTHON)" scripts/setup.sh plot,digits
	touch $@

# All that .ready has, and the developers' tools.
.venv/.ready-dev: $(SETUP)
	PYTHON="$(PYTHON)" scripts/setup.sh dev
	touch .venv/.ready $@
