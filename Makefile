# Every target sets up $(VENV) by itself on first use, and again when the requirements change.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
ARGS ?=
SGLANG_VENV ?= .venv-sglang
RAY_VENV ?= .venv-ray
DOCS_VENV ?= .venv-docs
export PYTHON CONSTRAINTS

requirements := pyproject.toml tools/setup_venv.sh $(wildcard $(CONSTRAINTS))
base := $(VENV)/.specrl-base
dev := $(VENV)/.specrl-dev
resolved := $(VENV)/.specrl-resolved
sglang := $(SGLANG_VENV)/.specrl-sglang
ray := $(RAY_VENV)/.specrl-ray
site := $(DOCS_VENV)/.specrl-docs

.PHONY: help quickstart bench test test-sglang test-ray check check-static check-ranges docs format setup constraints clean
.NOTPARALLEL:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14
	@echo; echo "Variables: ARGS='...' (for quickstart, bench, test), VENV=$(VENV), PYTHON=$(PYTHON), CONSTRAINTS=$(CONSTRAINTS)"

quickstart: $(base)  ## train a draft against the clock and see it win, on this machine
	$(VENV)/bin/specrl quickstart $(ARGS)

bench: $(base)  ## measure speculative against plain decoding on this machine
	$(VENV)/bin/specrl bench $(ARGS)

test: $(dev)  ## run the tests
	$(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)
	@echo "Not run: tests/sglang, with SGLang itself (make test-sglang; an environment of its own, about 2 GB)"
	@echo "Not run: tests/cluster, on a Ray cluster (make test-ray; another environment, about 2 GB)"

test-sglang: $(sglang)  ## run the tests with SGLang itself, on the CPU
	PYTHONPATH=$(CURDIR)/tests/sglang/shim SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
	    $(SGLANG_VENV)/bin/python -m pytest -c tests/sglang/pytest.ini tests/sglang $(ARGS)

test-ray: $(ray)  ## run the tests on a Ray cluster of two nodes on this machine
	$(RAY_VENV)/bin/python -m pytest -c tests/cluster/pytest.ini tests/cluster $(ARGS)

check: check-static check-ranges test  ## everything that must hold before a commit: the two below, and the tests

check-static: $(dev)  ## ruff (format and lint), mypy, import-linter, phrases that are hard to read
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/python tools/check_language.py

check-ranges: $(resolved)  ## whether the version ranges resolve, SGLang's pins included (again when they change)

docs: $(site)  ## build the documentation into site/, where every warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs --quiet build --strict
	@echo "Open site/index.html, or, for the search: python -m http.server --directory site"

format: $(dev)  ## let ruff format the code and repair what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

setup: $(dev)  ## only set up the virtual environment

constraints: $(dev)  ## record the versions installed now in constraints.txt
	@{ sed '/^[^#]/,$$d' constraints.txt; $(VENV)/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the virtual environment, caches and build products (results stay)
	rm -rf $(VENV) $(DOCS_VENV) $(RAY_VENV) site build dist *.egg-info .coverage .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(base): $(requirements)
	@tools/setup_venv.sh $(VENV)
	@touch $@

$(dev): $(requirements)
	@tools/setup_venv.sh $(VENV) dev
	@touch $(base) $@

$(resolved): $(dev) tools/check_resolve.py
	$(VENV)/bin/python tools/check_resolve.py && touch $@ || [ $$? -eq 3 ]  # 3: no package index to ask

$(sglang): pyproject.toml tools/setup_sglang.sh
	@tools/setup_sglang.sh $(SGLANG_VENV)
	@touch $@

$(ray): $(requirements)
	@tools/setup_venv.sh $(RAY_VENV) dev,ray
	@touch $@

$(site): pyproject.toml tools/setup_docs.sh tools/docs_constraints.txt
	@tools/setup_docs.sh $(DOCS_VENV)
	@touch $@
