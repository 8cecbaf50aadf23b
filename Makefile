PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Compiling all that is installed to byte code doubles the installation's time. Python compiles what is imported, once, if it may.
INSTALL := $(RUN) -m pip install -qq --no-compile --disable-pip-version-check
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test faults bench study check audit licences clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime
	$(RUN) jobs/cotrain.py tiny

test: $(VENV)/.dev
	$(RUN) -m pytest -m "not long" --numprocesses 3 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.dev
	$(RUN) -m pytest -m "fault or long"

bench: $(VENV)/.dev
	set -e; for script in tests/bench/bench_*.py; do $(RUN) $$script; done

study: $(VENV)/.dev
	$(RUN) tests/bench/study/run.py --publish
	$(RUN) tests/bench/study/broken.py

check: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict cola_dist

audit: $(VENV)/.dev
	.ci/audit

licences: $(VENV)/.dev
	$(RUN) -m tests.security.licences

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find cola_dist jobs tests cluster -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit("cola-dist needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(RUN)
	@echo "installing into $(VENV): 2 GB, a few minutes"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) --editable '.[dev]'
	@touch $@
