# Two commands on a fresh machine: `make demo` and `make test`. Each sets itself up first.
PYTHON ?= python3
BIN := .venv/bin
# Compiled tests and checks are kept, or every start would make them again.
unexport PYTHONDONTWRITEBYTECODE
INSTALLED := .venv/.installed
# The laws and engine parity, the hooks and the grid, habits of the house, settings, the main job.
QUICK := $(addprefix tests/test_, laws.py hooks.py grid.py \
	imports.py house.py words.py config.py options.py \
	study.py::test_the_run_directory_has_the_documented_files \
	study.py::test_what_was_written_is_what_was_measured \
	study.py::test_the_random_sets_are_the_documented_ones)

# What runs under TransformerLens 4 as well: the laws, engine parity and loading of every architecture,
# the main job, and the numbers of the built-in pair beside those of the other line.
LENS4 := $(addprefix tests/test_, laws.py architectures.py backends.py bridge.py loading.py study.py)
BIN4 := .venv-lens4/bin
INSTALLED4 := .venv-lens4/.installed

.PHONY: help demo test suite test-lens4 quick lint figures notebooks docs clean

help:
	@echo "make demo      run the main job on the built-in pair, into runs/demo/"
	@echo "make test      lint, type-check and test everything"
	@echo "make test-lens4  test what depends on TransformerLens under its line 4, with 3.9 beside it"
	@echo "make quick     lint, type-check, the laws, engine parity and the main job"
	@echo "make figures   draw every figure of figures/ again"
	@echo "make notebooks run every notebook of notebooks/ again"
	@echo "make docs      build the documentation site, into site/"
	@echo "make clean     remove the environment and all that was generated"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
# torch first and by its exact version, so that nothing else decides which build is taken.
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(INSTALLED4): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lens4
	grep -v '^transformer-lens==' constraints.txt > .venv-lens4/constraints.txt
	$(BIN4)/python -m pip install --quiet --constraint .venv-lens4/constraints.txt pip setuptools
	$(BIN4)/python -m pip install --quiet torch==2.13.0
	$(BIN4)/python -m pip install --quiet --constraint .venv-lens4/constraints.txt \
		transformer-lens==4.3.0 --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/rq4lens demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The type checker is one process and the tests wait for imports at first: both cores are busy.
test: $(INSTALLED)
	$(MAKE) --jobs 2 lint suite

suite: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-lens4: $(INSTALLED) $(INSTALLED4)
	OTHER_LINE=$(CURDIR)/$(BIN)/python $(BIN4)/python -m pytest \
		--numprocesses 2 --dist loadfile --no-loadscope-reorder $(LENS4)

quick: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow" $(QUICK)

figures: $(INSTALLED)
	$(BIN)/python figures/make.py

notebooks: $(INSTALLED)
	$(BIN)/python notebooks/make.py

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-lens4 runs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache test-artifacts
