# `make demo` and `make test` set up .venv by themselves. Another interpreter, more processes: make test PYTHON=python3.12 WORKERS=4
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
WORKERS ?= 2
DOCS   := $(VENV)/.docs
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# fastai's import makes torch announce the end of torch.jit.script, which is no news about this project
export PYTHONWARNINGS := ignore:`torch.jit.script` is deprecated:FutureWarning

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast lint gpu export notebooks readme docs dist hooks clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

$(READY): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

$(DOCS): $(READY)
	$(BIN)/pip install -q -e '.[docs]'
	@touch $@

demo: $(READY) ## See what RAdam is for, in a minute; figures and records go to runs/demo
	$(BIN)/radam-demo --out runs/demo

test test-fast notebooks: export OMP_NUM_THREADS := 1 # many small tensors, several processes: more threads only wait for each other
PYTEST := $(BIN)/pytest -q -n $(WORKERS) --dist loadgroup

test: lint $(DOCS) ## Check the style, run the notebooks, then all tests
	$(BIN)/nbdev-test --n-workers $(WORKERS)
	$(PYTEST) tests

test-fast: $(READY) ## Run the tests that take under a minute together
	$(PYTEST) -m "not slow" tests

lint: $(READY) ## Check modules, notebooks, tests and tools with ruff
	$(BIN)/ruff check

gpu: $(READY) ## Test, measure and train on a GPU, in eight minutes; results go to runs/gpu
	$(BIN)/radam-bench gpu --out runs/gpu

export: $(READY) ## Write the modules from the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

notebooks: export ## Run the notebooks, keep their outputs, and write README.md
	$(BIN)/nbdev-test --n-workers $(WORKERS) --save
	$(BIN)/nbdev-clean
	$(BIN)/python tools/readme.py

readme: $(READY) ## Write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(DOCS) ## Write the site to _docs
	$(BIN)/python -m mkdocs build --strict

dist: $(READY) ## Build the sdist and the wheel, check them, and install the wheel where nothing else is
	rm -rf dist
	$(BIN)/python -m build -q --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m venv --clear build/clean
	build/clean/bin/pip install -q --no-index --no-deps dist/*.whl
	build/clean/bin/python -I -c "import radam_fastai as r, importlib.metadata as m; assert r.__version__ == m.version('radam_fastai'); print(r.__file__, r.__version__)"

hooks: $(READY) ## Let git check what is committed, and merge and compare notebooks by cells
	$(BIN)/nbdev-install-hooks
	$(BIN)/pip install -q pre-commit
	$(BIN)/pre-commit install

clean: ## Remove build products and caches, not .venv or runs
	rm -rf build dist _docs radam_fastai.egg-info .pytest_cache .ruff_cache .hypothesis
	find radam_fastai tests tools -name __pycache__ -prune -exec rm -rf {} +
