# Everything happens in .venv/ and in a cache folder (X2DFD_CACHE, default: the user's cache directory).

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OMP_NUM_THREADS ?= 2
PYTEST_ARGS ?=

# Extras of pyproject.toml to install. `app`, `c2pa` and `browser` are among them so that their tests run instead of being skipped.
# Each choice has its own stamp: `make setup EXTRAS=dev,train`.
EXTRAS ?= dev,app,c2pa,browser
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'

# Further options of `make bench`: --only cuda, --questions 100. BENCH_DATA=MANIFEST, with labels and sources: peers score
# its pictures too, and quality is drawn against cost. BENCH_OUT: the folder of the result files, eval/results for the
# tables. GPU_ARGS=--dry: a rehearsal on a CPU.
BENCH_ARGS ?=
BENCH_DATA ?=
BENCH_OUT ?= build
GPU_ARGS ?=
FUZZ_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup fetch check test test-all test-distributed demo road tables tables-check clean-install bench bench-gpu fuzz clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## Make .venv and install what pyproject.toml and constraints.txt say

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || { $(PYTHON) -c $(NEW_ENOUGH) && $(PYTHON) -m venv $(VENV); }
	$(PY) -m pip install --disable-pip-version-check --no-input --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

fetch: setup ## Get the embedded model's parts into the cache (quick when they are there)
	$(VENV)/bin/x2dfd fetch

check: setup ## Lint, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: setup fetch check ## All checks, then the tests that are not marked slow
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m pytest $(PYTEST_ARGS)

test-all: setup fetch check ## All checks and all tests, the slow ones too: what CI runs
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m pytest -m "not distributed" $(PYTEST_ARGS)

test-distributed: setup fetch ## Trainings of two processes under DeepSpeed (with EXTRAS=dev,train)
	$(PY) -c 'import deepspeed' || { echo "needs the extra: make test-distributed EXTRAS=dev,train" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(PY) -m pytest -m distributed tests/test_distributed.py $(PYTEST_ARGS)

demo: setup fetch ## Verdicts for a real photo and its forged twin, and an HTML report in build/demo
	$(PY) -m data_gen.demo --out build/demo

road: setup fetch ## The whole pipeline on a small sample: forge, assess, build, train, calibrate, score
	$(PY) road.py --out build/road

tables: setup ## Write the README's result tables from the result files
	$(PY) -m eval.tables

tables-check: setup ## Fail when the README's tables differ from the result files
	$(PY) -m eval.tables --check

clean-install: setup ## Wheel, plug-in and container's steps in an empty environment
	$(PY) .ci/clean_install.py

bench: setup fetch ## A against B, in five minutes of a quiet machine; BENCH_DATA=MANIFEST adds quality beside cost
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m benchmarks.speed --rounds 3 --questions 16 --threads $(OMP_NUM_THREADS) \
		--out $(BENCH_OUT)/speed.json $(BENCH_ARGS)
ifdef BENCH_DATA
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(PY) -m benchmarks.quality --data $(BENCH_DATA) --threads $(OMP_NUM_THREADS) \
		--out $(BENCH_OUT)/quality.json --plot build/quality.png
endif

bench-gpu: ## The figures of a CUDA card, in eight minutes, into build/gpu; needs a venv with a torch for it
	PYTHON=$(PY) sh benchmarks/gpu.sh $(GPU_ARGS)

fuzz: setup fetch ## Mutants of small files against every parser; FUZZ_ARGS='jpeg --mutants 20000 --seed 1'
	$(PY) -m tests.fuzz --out build/fuzz $(FUZZ_ARGS)

clean: ## Remove what was built; .venv and the cache stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path './$(VENV)' -prune -o -name __pycache__ -prune -exec rm -rf {} +
