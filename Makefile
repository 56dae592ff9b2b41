# lmworks: `make quickstart` and `make test` each set up .venv by themselves; a second call installs nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: quickstart quickstart-gpt test test-slow check clean

quickstart quickstart-gpt: $(VENV)/.installed
	$(BIN)/lmworks run $@

# Tests use one thread each: two files at a time, each in one process, so that its fixtures are made once; the longest
# come first (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: check
	$(PYTEST) -m "not slow"

# What compiles C++, or proves once more on another model or stage what a quicker test proves.
test-slow: $(VENV)/.installed
	$(PYTEST) -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_imports.py

# torch first and by its exact version: asked for otherwise, pip may take another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "lmworks needs Python 3.11 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,deepspeed,rtx,dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
