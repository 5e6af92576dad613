# Two commands do all set-up: `make demo` (the main job, end to end) and `make test` (the whole suite).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Three processes keep two cores busy, as a third of their time is waiting; `make test TESTS='-n 0 tests/storage'` runs some in one.
TESTS ?= -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-random lint docs clean

# The stamp is newer than the files that decide what is installed, or the install runs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=examples:docs $(BIN)/mypy examples docs
	MYPYPATH=examples:benchmarks:docs $(BIN)/mypy benchmarks tests
	$(BIN)/lint-imports

# The site, into site/, to be read offline; a warning is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: lint docs
	$(BIN)/pytest $(TESTS)

# Other examples and another order each time; the seeds are printed, to be given again.
test-random: $(VENV)/.installed
	$(BIN)/pytest $(TESTS) --random-order --hypothesis-profile=random

clean:
	rm -rf $(VENV) demo site
