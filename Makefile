# Each target creates .venv and installs what it needs, again only when pyproject.toml or constraints.txt change.
# --no-compile: most of the 26,000 modules are never imported, and Python compiles the others once, at their first
# import. Containers often set the variable below: every process would compile them again, and import for twice as long.
unexport PYTHONDONTWRITEBYTECODE
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# Three test processes keep two cores busy: one that launches ranks often waits for them.
PYTEST := $(VENV)/bin/python -m pytest -n 3 --dist worksteal

.PHONY: demo test test-all tests tests-all compiled lint docs bench

demo: $(READY)
	$(VENV)/bin/vimscale launch vim_digits_cpu
	$(VENV)/bin/vimscale evaluate vim_digits_cpu
	$(VENV)/bin/vimscale export vim_digits_cpu --to safetensors
	@echo
	@echo "The run is in runs/vim_digits_cpu: metrics.jsonl, checkpoints/, export/model.safetensors."
	@echo "Next: source $(VENV)/bin/activate, then vimscale --help; docs/one-image.md shows how it works."

# A fault that lint finds is printed at once, and ends make once the tests have run.
test: $(READY)
	$(MAKE) -j 2 lint tests

test-all: $(READY)
	$(MAKE) -j 2 lint tests-all

tests: compiled
	$(PYTEST)

tests-all: compiled
	$(PYTEST) -m "not gpu"

compiled: $(READY)
	$(VENV)/bin/python -m tests.support.compiled

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY)
	$(VENV)/bin/python docs/build.py
	@echo "The site is in site/: open site/index.html."

bench: $(READY)
	$(VENV)/bin/python -m pip install -qq -c constraints.txt -e '.[bench]'
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(VENV)/bin/python -m pip install -qq -c constraints.txt \
		--no-build-isolation --no-deps mamba-ssm
	$(VENV)/bin/python -m benchmarks.startup
	$(VENV)/bin/python -m benchmarks.scan_cpu
	$(VENV)/bin/python -m benchmarks.loader
	$(VENV)/bin/python -m benchmarks.checkpoint
	$(VENV)/bin/python -m benchmarks.directions
	$(VENV)/bin/python -m benchmarks.vit
	$(VENV)/bin/python -m benchmarks.long

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("vimscale needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV), a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq --no-compile -c constraints.txt -e '.[dev]'
	@touch $@
