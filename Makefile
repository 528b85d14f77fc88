# Two commands do the work: `make demo` and `make test`. Both make .venv first, from the lock, when it has changed.
#   make demo LOCK=gpu             with paddlepaddle-gpu (CUDA 11.8)
#   make test PYTHON=python3.12    with another Python
PYTHON ?= python3
LOCK ?= cpu
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that share the tests of `make test`, file by file; each takes up to 4 GB (0: one process, for --pdb say).
WORKERS ?= 2
# Files of `make test-quick`, in one process: they show what differs between Python versions.
QUICK := config yaml_file reader commands user_files doctor install packaging architecture cpus threads cache_dir \
  course ahead agreement confidence evaluation progress report report_parts split upstream deformable_attention \
  model_folder lowering installed fuzz sample
# What `make lint` reads; mypy reads act_pipeline (pyproject.toml).
LINTED := act_pipeline tools deploy tests requirements notebooks
# The server's tests need Triton's binaries, which are for glibc 2.35 and later; elsewhere these tests skip.
TRITON := $(shell getconf GNU_LIBC_VERSION 2>/dev/null | \
  awk '{split($$2, v, "."); if (v[1] > 2 || v[2] >= 35) print "requirements/serve.txt"}')
# Locks of what is optional that `make benchmark` compares.
RUNTIMES ?= onnxruntime nncf

VENV_PYTHON := $(VENV)/bin/python
INSTALL = $(PYTHON) requirements/install.py --venv $(VENV)
LOCK_TOOL := .venv-lock

.DEFAULT_GOAL := help
.PHONY: help demo benchmark test test-quick test-all lint doctor lock clean env env-dev check-python

help: ## what there is to make
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: env ## the whole path on the built-in sample: export, compress, evaluate, a table
	@$(VENV_PYTHON) tools/demo.py

benchmark: demo ## the sample in every engine and precision that this machine has, compared with NNCF's INT8 (Python 3.10 or later)
	@$(INSTALL) requirements/$(LOCK).txt $(RUNTIMES:%=requirements/%.txt)
	@$(VENV_PYTHON) deploy/benchmark.py --peer nncf --json output/benchmark.json --chart output/benchmark.png

test: env-dev ## the tests, with one run of the whole path, without the slow ones
	@echo "test: running the tests (make test-all runs the slow ones too)"
	@$(VENV_PYTHON) -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-quick: env-dev ## the tests that neither compress nor train, for another Python: make test-quick PYTHON=python3.12 VENV=.venv-3.12
	@echo "test-quick: running the tests that neither compress nor train"
	@$(VENV_PYTHON) -m pytest -q -m "not slow" $(QUICK:%=tests/test_%.py) $(PYTEST_ARGS)

test-all: env-dev ## all tests
	@echo "test: running all tests, the slow ones too"
	@$(VENV_PYTHON) -m pytest -q $(PYTEST_ARGS)

lint: env-dev ## ruff (rules and format) and mypy, as tests/test_lint.py runs them
	@$(VENV_PYTHON) -m ruff check $(LINTED)
	@$(VENV_PYTHON) -m ruff format --check $(LINTED)
	@$(VENV_PYTHON) -m mypy

doctor: env ## versions, GPU, CUDA, TensorRT, and which engines run here
	@$(VENV_PYTHON) -m act_pipeline.doctor

lock: check-python ## the lock files anew from requirements/*.in (UPGRADE=1: with the newest versions that fit)
	@$(PYTHON) requirements/install.py --venv $(LOCK_TOOL) requirements/lock-tool.txt
	@$(LOCK_TOOL)/bin/python requirements/lock.py --uv $(LOCK_TOOL)/bin/uv $(if $(UPGRADE),--upgrade)

clean: ## remove .venv and what the commands made (dataset/, output/)
	@echo "clean: removing $(VENV), $(LOCK_TOOL), dataset/sample, output and caches"
	@rm -rf $(VENV) $(LOCK_TOOL) dataset/sample output build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

env: check-python ## .venv with what the commands need
	@$(INSTALL) requirements/$(LOCK).txt

env-dev: check-python # .venv with what the tests need too
	@$(INSTALL) requirements/$(LOCK).txt requirements/dev.txt $(TRITON)

check-python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) is not on the PATH, expected Python 3.9 to 3.12: install one, or make PYTHON=/path/to/python3" >&2; \
	  exit 2; }
