# Everything a developer does, by name. Each target makes the .venv it needs; nothing else has to be installed first.
#
# constraints.txt holds torch back to one version. On a Linux machine without a GPU add
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# or pip fetches gigabytes of CUDA libraries with it.

PYTHON ?= python3
BIN := .venv/bin
# Stamps, newer than what they were made from: `run` has what quickstart needs, `dev` has everything.
RUN := .venv/.installed-run
DEV := .venv/.installed-dev
# The engines have an environment of their own: they want other versions than the rest, and each other's too.
ADAPTERS := .venv-adapters/.installed
# The oldest DuckDB and pyarrow that emberflow is tested with.
OLDEST := .venv-oldest/.installed
# Processes that share the tests; a third fills what two cores wait for. `.venv/bin/pytest FILE` runs a file in one.
WORKERS ?= 3
INPUTS := pyproject.toml constraints.txt hatch_build.py $(wildcard fs/emberfs/lane/*.c fs/emberfs/lane/*.h trainer/embertrain/kernels/*.c trainer/embertrain/kernels/*.h)

# Tests and benchmarks start many processes, which should find compiled what those before them have imported.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-adapters test-oldest check bench docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name what; do printf '  make %-14s %s\n' "$$name" "$$what"; done

quickstart: $(RUN) ## the whole story on real text: corpus, SQL, tokens, a small model trained, killed, resumed, asked (STEPS=)
	$(BIN)/python -m emberline.quickstart

test: $(DEV) ## run every test, in several processes (WORKERS=)
	$(BIN)/pytest -q -n $(WORKERS)

test-adapters: $(ADAPTERS) ## test the KV cache with LMCache, vLLM and SGLang, without a GPU (fetches 2 GB)
	.venv-adapters/bin/pytest -q -W default --timeout 120 tests/adapters

test-oldest: $(OLDEST) ## test the dataflow layer with DuckDB 1.4 and pyarrow 20
	.venv-oldest/bin/pytest -q -W default tests/dataflow

check: $(DEV) ## what CI runs: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n $(WORKERS)

bench: $(DEV) ## run every benchmark (one alone: .venv/bin/python -m benchmarks NAME)
	$(BIN)/python -m benchmarks all

docs: $(DEV) ## check that every link in the documents resolves and every command they show exists
	$(BIN)/pytest -q tests/test_docs.py

clean: ## remove what make, the tools and quickstart made, .venv too
	rm -rf .venv .venv-adapters .venv-oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis .bench build dist quickstart-store quickstart-run
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN): $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[quickstart,train]'
	@touch $@

$(DEV): $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(RUN)

$(ADAPTERS): $(INPUTS) tests/adapters/requirements.txt tests/adapters/engines.txt
	test -x .venv-adapters/bin/python || $(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/pip install -q --no-warn-conflicts -c constraints.txt -e . -r tests/adapters/requirements.txt
	.venv-adapters/bin/pip install -q --no-deps -r tests/adapters/engines.txt
	@touch $@

$(OLDEST): $(INPUTS)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints.txt -e '.[dev]' 'duckdb==1.4.4' 'pyarrow==20.*' pytz
	@touch $@
