# Needs Python 3.11 or newer with pip, and a C compiler; everything else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
TESTS ?= tests
PART ?= 1/1

venv := .venv/bin/python
pip := PYTHONWARNINGS=ignore $(venv) -m pip install -qq $(PIP_FLAGS) -c tools/dev/constraints.txt
threads := OMP_NUM_THREADS=1
described := pyproject.toml tools/dev/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help pretrain test test-slurm test-large verify-all check lint wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

pretrain: .venv/.stamp-run ## train a small model on two processes: data, stop, resume, samples, report
	@$(venv) tools/pretrain.py

test: .venv/.stamp-test ## every test that needs no GPU; TESTS=tests/repo runs one group
	@$(threads) $(venv) -m pytest -m "not gpu and not full and not large and not slurm" --durations=15 $(TESTS)

test-slurm: .venv/.stamp-test ## what needs a Slurm cluster, brought up here; tools/ci/install_slurm.sh installs it
	@$(threads) $(venv) -m pytest -m slurm -o timeout=1200 --durations=15 tests/slurm

test-large: .venv/.stamp-test ## what needs tens of GB of disk: 8 GB converted under a limit of 2 GB of memory
	@$(threads) $(venv) -m pytest -m large $(TESTS)

verify-all: .venv/.stamp-test ## any layout equals one process, for the whole product; PART=3/16 runs one part of it
	@$(threads) PART=$(PART) $(venv) -m pytest -m full -s tests/equivalence/test_matrix.py

check: .venv/.stamp-test ## the one command before a commit: format, imports, sizes, types, fast tests
	@tools/dev/check

lint: .venv/.stamp-test ## format the code and mend what ruff can mend
	@$(venv) -m ruff format framework kernels tools tests
	@$(venv) -m ruff check --fix framework kernels tools tests

wheel: .venv/.stamp-test ## dist/shardforge-*.whl, recipes and Slurm templates inside
	@rm -rf build dist
	@$(venv) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove what make made, .venv included; runs/ and data/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find framework kernels tools tests -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ShardForge needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv

# torch comes first and by exact version, so that pip never looks at another build of it.
.venv/.stamp-run: .venv/bin/pip $(described)
	@echo "installing ShardForge and torch into .venv (once)"
	@$(pip) pip setuptools torch
	@$(pip) --no-build-isolation -e .
	@touch $@

.venv/.stamp-test: .venv/.stamp-run
	@echo "installing what the tests need into .venv (once)"
	@$(pip) --no-build-isolation -e '.[dev]'
	@touch $@
