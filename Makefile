# make demo   the whole road on the embedded default, from nothing
# make test   lint, types, import contract and tests, from nothing
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed
TEST_STAMP = $(VENV)/.installed-test
PARITY_STAMP = $(VENV)/.installed-parity
WORKDIR ?= demo_run

.PHONY: demo test lint format types imports pytest slow parity mutants bench clean

demo: $(STAMP)
	$(RUN) -m zephyr_jax demo --workdir=$(WORKDIR) $(if $(SHORT),--short)

test: lint types imports pytest

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'error: Python 3.11 or newer is needed; name one with make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(TEST_STAMP): $(STAMP)
	$(RUN) -m pip install --quiet --editable ".[test]"
	touch $@

$(PARITY_STAMP): $(TEST_STAMP)
	$(RUN) -m pip install --quiet "torch==2.13.0"
	$(RUN) -m pip install --quiet --editable ".[parity]"
	touch $@

lint: $(TEST_STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(TEST_STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(TEST_STAMP)
	$(RUN) -m pyright --pythonpath $(RUN)

imports: $(TEST_STAMP)
	$(VENV)/bin/lint-imports

pytest: $(TEST_STAMP)
	$(RUN) -m pytest -m "not slow and not parity" -n 2 --dist loadfile

# checks that take longer than a minute
slow: $(TEST_STAMP)
	$(RUN) -m pytest -m slow

# live comparisons with torch and transformers
parity: $(PARITY_STAMP)
	$(RUN) -m pytest -m parity

# every pitfall's one-line mutation must turn its test red (docs/pitfalls.md)
mutants: $(TEST_STAMP)
	$(RUN) tests/mutants.py

bench: $(PARITY_STAMP)
	$(RUN) benchmarks/run.py

clean:
	rm -rf $(VENV) demo_run
