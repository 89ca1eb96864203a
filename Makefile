# `make help` lists the targets. Each sets up what it needs: `make test` on a fresh machine is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := samples,segment,detect,datasets,export,wandb,mlflow,docs,dev
DEMO_DIR ?= demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test slow faults lint docs dist bench gpu clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

setup: $(VENV)/minkowski.stamp ## create .venv with everything in it; does nothing if it is up to date

demo: setup ## sample images, pretrain, convert, fine-tune, evaluate, reconstruct; DEMO_DIR=demo
	$(BIN)/python benchmarks/demo.py --out $(DEMO_DIR)

test: setup ## run the tests except the slow ones, two at a time; ARGS="-k loss" is passed on to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

slow: setup ## run the slow tests
	$(BIN)/python -m pytest -m slow $(ARGS)

faults: setup ## run the fault campaigns, hours in full; ROW=kill runs one; resumes where it stopped
	$(BIN)/python -m tests.faults $(if $(ROW),--row $(ROW)) $(ARGS)

lint: setup ## ruff's rules and format, and mypy's types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## build the documentation site into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going -d docs/_build/doctrees docs docs/_build/html

dist: setup ## build the wheel and the source distribution into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation --skip-dependency-check
	$(BIN)/python -m twine check --strict dist/*

bench: setup ## time the engines side by side; ARGS="--json" is passed on
	$(BIN)/fcmae bench $(ARGS)

gpu: setup ## check and measure everything on a GPU, at most 8 minutes; ARGS=--toy tries it on a CPU
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## remove .venv, caches and the demo's folder
	rm -rf $(VENV) $(DEMO_DIR) build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'error: $(PYTHON) must be Python 3.10 or newer; try: make setup PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo 'error: $(PYTHON) has no venv module; on Debian run: sudo apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/setup.stamp: constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# Exit code 3 means "continue without MinkowskiEngine": no stamp is written, so the next run tries again.
$(VENV)/minkowski.stamp: $(VENV)/setup.stamp
	@$(BIN)/python -m sparse.install_minkowski; code=$$?; \
	    if [ $$code -eq 0 ]; then touch $@; elif [ $$code -ne 3 ]; then exit $$code; fi
