# Everything runs with the tools of the active environment; PYTHON=... chooses another Python.
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install format check lint types layers test test-nightly demo docs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

install:  ## the package, editable, and every tool for working on it
	$(PYTHON) -m pip install -e ".[dev]"

format:  ## let ruff repair what it can, then format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check: lint types layers test  ## everything that must pass before a commit

lint:  ## ruff, its format, and the word list
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) .ci/check_words.py

types:  ## mypy --strict on the package
	$(PYTHON) -m mypy

# import-linter has no `python -m`; its `lint-imports` script calls this function.
layers:  ## a file imports only from layers below its own
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-logo

test:  ## tests and doctests, in two processes
	$(PYTHON) -m pytest

test-nightly:  ## all tests, those marked nightly too, in a random order and with new random examples
	$(PYTHON) -m pytest -p randomly -m "" --hypothesis-profile=nightly

demo:  ## long-tailed digits, from training to report
	lpt-peft demo

docs:  ## HTML in docs/_build/html; a warning is an error
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html
