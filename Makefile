# `make train` and `make test` do all their own set-up. PYTHON chooses the interpreter that makes .venv (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PREP_FLAGS ?=
TRAIN_FLAGS ?=

.PHONY: train test test-gpu prove lint types clean help

train: $(INSTALLED)  ## prepare the embedded corpus, train crystal_demo, print a summary; again: says it is complete, or resumes
	$(BIN)/weftrain prep $(PREP_FLAGS)
	$(BIN)/weftrain train crystal_demo $(TRAIN_FLAGS)

test: $(INSTALLED)  ## the test suite, at most 10 minutes on 2 cores; Triton's kernels are interpreted in a process of their own
	$(BIN)/pytest -m "not prove" --ignore tests/kernels/interpreted
	TRITON_INTERPRET=1 $(BIN)/pytest -m "not prove" tests/kernels/interpreted

test-gpu: $(INSTALLED)  ## every kernel's questions, asked of the CUDA device
	$(BIN)/pytest tests/kernels/test_checks.py --kernel-device cuda

prove: $(INSTALLED)  ## the longer proofs: kill storms, fuzzing, the compile gate, every question asked of every Triton kernel
	$(BIN)/pytest -m prove --ignore tests/kernels/interpreted
	TRITON_INTERPRET=1 $(BIN)/pytest -m prove tests/kernels/interpreted

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy sees the folders under their installed names through a tree of links
	mkdir -p .typecheck/weftrain
	for folder in core kernels data_prep backends analysis cli; do ln -sfn ../../$$folder .typecheck/weftrain/$$folder; done
	cd .typecheck && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p weftrain.core -p weftrain.kernels -p weftrain.backends -p weftrain.data_prep -p weftrain.analysis -p weftrain.cli

# Made anew when what is installed changes; a set-up that was interrupted is not marked and runs again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "weftrain needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

clean:  ## removes the environment and caches; never runs or datasets
	rm -rf $(VENV) .typecheck .pytest_cache .mypy_cache .ruff_cache build *.egg-info

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/:/'
