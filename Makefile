# `make train` and `make test` do all their own set-up. PYTHON chooses the interpreter that makes .venv (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PREP_FLAGS ?=
TRAIN_FLAGS ?=
# Test files are dealt to WORKERS processes. Threads that wait must not spin, or the processes would slow each other down.
# Bytecode is kept whatever the caller's environment says: hundreds of processes import the same modules.
WORKERS ?= 2
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

.PHONY: train test test-gpu gpu gpu-wheels matrix prove soak prove-cerebras crystalcoder-step crystalcoder-1b-step lint types docs clean help

train: $(INSTALLED)  ## prepare the embedded corpus, train crystal_demo, print a summary; again: says it is complete, or resumes
	$(BIN)/weftrain prep $(PREP_FLAGS)
	$(BIN)/weftrain train crystal_demo $(TRAIN_FLAGS)

test: $(INSTALLED)  ## the test suite, at most 10 minutes on 2 cores; Triton's kernels are interpreted in a process of their own
	$(PYTEST) -m "not prove and not cerebras and not soak" --ignore tests/kernels/interpreted --durations 20
	TRITON_INTERPRET=1 $(PYTEST) --dist load -m "not prove and not soak" tests/kernels/interpreted

test-gpu: $(INSTALLED)  ## every kernel's questions, and what of the backends only a GPU shows
	$(BIN)/pytest tests/kernels/checks/test_engine.py tests/kernels/bench/test_on_a_gpu.py --kernel-device cuda
	$(BIN)/pytest tests/kernels/test_on_gpu.py tests/kernels/test_attention_on_gpu.py
	$(BIN)/pytest tests/backends/test_on_gpu.py

# GPU_FLAGS: --dry on a machine without one, --only CHECK, --budget SECONDS. See docs/first-run-on-a-gpu.md.
GPU_FLAGS ?=
gpu: $(INSTALLED)  ## the first eight minutes on a GPU: proofs and figures, gpu-report/report.html
	$(BIN)/weftrain gpu $(GPU_FLAGS)

# WHEELS_FLAGS: --python 3.12, --float8, --there NAME ... for what that machine has beside torch and triton.
WHEELS ?= build/gpu-wheels
WHEELS_FLAGS ?=
gpu-wheels: $(INSTALLED)  ## wheels for `weftrain gpu` on a machine without a package index
	rm -rf $(WHEELS)
	$(BIN)/python -m weftrain.analysis.first_contact.wheels . --to $(WHEELS) $(WHEELS_FLAGS)

prove: $(INSTALLED)  ## the longer proofs: kill storms, fuzzing, the compile gate, every question asked of every Triton kernel
	$(PYTEST) -m "prove and not cerebras and not soak" --ignore tests/kernels/interpreted --durations 20
	TRITON_INTERPRET=1 $(PYTEST) --dist load -m "prove and not soak" tests/kernels/interpreted

soak: $(INSTALLED)  ## hours: what the proofs are the shorter form of (more seeds, the other tier, dtype or layout); not in CI, which has 45 minutes
	$(BIN)/pytest -m soak --ignore tests/kernels/interpreted
	TRITON_INTERPRET=1 $(BIN)/pytest -m soak tests/kernels/interpreted

# The vendor's environment (5.3 GB) is made once, in the user's cache folder. Without it the tests are skipped, counted and say so.
prove-cerebras: $(INSTALLED)  ## what needs the Cerebras compiler's front end: lowering of every recipe, golden graphs, its CPU backend, its checkpoints
	timeout 600 $(BIN)/weftrain backends setup cerebras || echo "the Cerebras environment could not be made within 10 minutes: its tests are skipped"
	$(PYTEST) -m "cerebras and not soak" --ignore tests/kernels/interpreted

# The whole CrystalCoder-7B: one optimizer step of 2048 tokens with memory capped at 8 GB; 66 GB of disk. See docs/weight-streaming.md.
# CRYSTALCODER_FLAGS lays further overrides over both targets, such as a smaller model.
CRYSTALCODER_RUNS ?= runs
CRYSTALCODER_FLAGS ?=
ONE_STEP := data.sources=[] data.synthetic_rows=1 batch.replicas=1 batch.global_batch_size=1 batch.micro_batch_size=1 \
	'schedule.learning_rate=[{shape: constant, steps: 100, start: 1.4e-4}]' log.every_steps=1 log.evaluate_every_steps=0 \
	checkpoint.every_steps=0 backend.options.activations=recompute backend.options.tier=direct
# `plan` and `train` are given the same words, so that what is predicted is what runs.
SEVEN_BILLION := $(ONE_STEP) schedule.steps=1 checkpoint.at_end=false backend.options.state_format=bf16_moments \
	backend.options.memory_limit_mib=8192 backend.options.trace_steps=1 $(CRYSTALCODER_FLAGS)

crystalcoder-step: $(INSTALLED)  ## one real step of CrystalCoder-7B by weight streaming, 8 GB of memory, 66 GB of disk, about 8 minutes
	$(BIN)/weftrain plan crystalcoder_7b_phase1 --backend streaming --disk $(CRYSTALCODER_RUNS) $(SEVEN_BILLION)
	$(BIN)/python -m weftrain.analysis.machine.memory_cap 8192 -- $(BIN)/weftrain train crystalcoder_7b_phase1 --backend streaming --runs $(CRYSTALCODER_RUNS) \
		--run crystalcoder_step $(SEVEN_BILLION)

# 1.2 billion parameters: as wide as CrystalCoder-1.3B would be, 23 layers, fp32, so that the store stays below 20 GB.
ONE_BILLION := model.hidden_size=2048 model.num_layers=23 model.num_heads=16 model.intermediate_size=5461 precision.compute=float32 \
	data.sequence_length=256 schedule.steps=2 $(CRYSTALCODER_FLAGS)
crystalcoder-1b-step: $(INSTALLED)  ## two steps of a 1.2B model, streamed and in memory, and whether every tensor is the same; 20 GB of store, 30 GB of checkpoints
	$(BIN)/weftrain train crystalcoder_7b_phase1 --backend streaming --runs $(CRYSTALCODER_RUNS) --run streamed_1b $(ONE_STEP) $(ONE_BILLION) backend.options.threads=2
	$(BIN)/weftrain train crystalcoder_7b_phase1 --backend local --runs $(CRYSTALCODER_RUNS) --run local_1b $(filter-out backend.options.%,$(ONE_STEP)) $(ONE_BILLION) \
		backend.options.activation_checkpointing=full backend.options.threads=2
	$(BIN)/python -m weftrain.analysis.compare.same_state $(CRYSTALCODER_RUNS)/streamed_1b $(CRYSTALCODER_RUNS)/local_1b

# Pairs of a Python and a torch, the oldest and the newest among them. TORCH_INDEX=https://download.pytorch.org/whl/cpu
# takes CPU builds (0.7 GB an environment, not 5); a Python that is not there is passed over (`uv python install 3.13`).
MATRIX ?= python3.11:2.6.0 python3.12:2.8.0 python3.13:2.13.0
TORCH_INDEX ?=
matrix:  ## weftrain with the oldest and the newest torch and Python, in environments below build/matrix
	$(PYTHON) tests/version_matrix.py --folder build/matrix $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) $(MATRIX)

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy sees the folders under their installed names through a tree of links
	mkdir -p .typecheck/weftrain
	for folder in core kernels data_prep exchange backends analysis cli; do ln -sfn ../../$$folder .typecheck/weftrain/$$folder; done
	cd .typecheck && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p weftrain.core -p weftrain.kernels -p weftrain.backends -p weftrain.data_prep -p weftrain.exchange -p weftrain.analysis -p weftrain.cli

docs: $(INSTALLED)  ## the documentation as a site in build/site; a broken link is an error
	$(BIN)/python docs/draw_architecture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

# Made anew when what is installed changes; a set-up that was interrupted is not marked and runs again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "weftrain needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)

clean:  ## removes the environment and caches; never runs or datasets
	rm -rf $(VENV) .typecheck .pytest_cache .mypy_cache .ruff_cache build *.egg-info

help:  ## these lines
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*##/:/'
