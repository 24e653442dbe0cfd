# Everything runs with the tools of the active environment; PYTHON=... chooses another one.
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install format check lint types layers test demo docs

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install:  ## the package, editable, with all it takes to work on it
	$(PYTHON) -m pip install -e ".[dev]"

format:  ## let ruff repair what it can, then format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check: lint types layers test  ## all that must pass before a commit

lint:  ## ruff, its format, and the word list
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) .ci/check_words.py

types:  ## mypy --strict on the package
	$(PYTHON) -m mypy

# import-linter has no `python -m`; this is what its `lint-imports` script calls.
layers:  ## a file imports only from layers below its own
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-logo

test:  ## tests and doctests
	$(PYTHON) -m pytest

demo:  ## long-tailed digits, start to end
	lpt-peft demo

docs:  ## HTML in docs/_build/html; a warning is an error
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html
