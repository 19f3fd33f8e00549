# The first target that is run creates .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Libraries whose versions do not fit beside each other are tested in environments of their own.
ECOSYSTEM := $(patsubst tests/ecosystem/%/requirements.txt,%,$(wildcard tests/ecosystem/*/requirements.txt))

.PHONY: help quickstart test test-ecosystem check style docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' \
		|| { echo "phi3v needs Python 3.11.4 or newer; choose one: make PYTHON=python3.12 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.installed  ## a first fine-tune on the CPU: LoRA on a tiny model with easy-vqa, evaluated before and after (10 minutes)
	$(BIN)/phi3v quickstart

test: check  ## linter, type checker and the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-ecosystem: $(ECOSYSTEM:%=.venv-ecosystem/%/.installed)  ## the libraries that take the model, each in its own environment
	set -e; for name in $(ECOSYSTEM); do .venv-ecosystem/$$name/bin/python -m pytest tests/ecosystem/$$name; done

.venv-ecosystem/%/.installed: tests/ecosystem/%/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-ecosystem/$*
	.venv-ecosystem/$*/bin/python -m pip install --quiet -r $< -e .
	test ! -f $(<D)/unused.txt || .venv-ecosystem/$*/bin/python -m pip uninstall --quiet --yes -r $(<D)/unused.txt
	test ! -f $(<D)/no_deps.txt || .venv-ecosystem/$*/bin/python -m pip install --quiet --no-deps -r $(<D)/no_deps.txt
	@touch $@

check: $(VENV)/.installed  ## linter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed  ## build the site of docs/ in build/site; it opens without a server
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html"

clean:  ## remove .venv and the files of the quickstart
	rm -rf $(VENV) .venv-ecosystem quickstart
