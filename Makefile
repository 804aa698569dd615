PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

SOURCES := .venv/modules pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)

.PHONY: run test test-integration test-distributed test-slow test-sanitizers test-all test-gpu \
	environments matrix lint format bench bench-jax bench-sharded bench-gpu dist clean

run: .venv/app  ## the study that shows the point, then one full training
	$(BIN)/larskit study --models convnet convnet-plain --optimizers sgd lars adamw \
		--batch-sizes 64 1437 --epochs 15 --out runs/study
	$(BIN)/larskit train --best-of runs/study/results.json --optimizer lars \
		--epochs 30 --out runs/train --overwrite

# A test belongs to the last of these tiers that it is marked with. ARGS: pytest's.
TIERS := test test-integration test-distributed test-slow
PYTEST := PIP_NO_INDEX=1 $(BIN)/python -m pytest
# Test files in several processes, of one thread each; ARGS="-n0 --pdb" for a debugger.
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) --numprocesses=logical --maxprocesses=4 --dist=worksteal

test: .venv/dev  ## the tests that run in-process: what a change is tried with
	$(PARALLEL) -m "not (integration or distributed or slow)" $(ARGS)

test-integration: .venv/dev environments  ## other packages, every integration, examples, commands
	$(PYTEST) -m "integration and not (distributed or slow)" $(ARGS)

test-distributed: .venv/dev  ## torchrun, eight devices, processes that are killed
	$(PYTEST) -m "distributed and not slow" $(ARGS)

test-slow: .venv/dev  ## what takes minutes, and hypothesis with many examples
	$(PARALLEL) -m slow $(ARGS)
	$(PARALLEL) -m "hypothesis and not slow" --hypothesis-profile=fuzz $(ARGS)

test-sanitizers: .venv/dev  ## the C++ kernel under the sanitizers: a part of test-slow
	$(PYTEST) -m slow tests/engines/test_sanitizers.py $(ARGS)

test-all: .venv/dev environments  ## every tier, and how long each takes; with ARGS, what they name
ifdef ARGS
	$(PYTEST) $(ARGS)
else
	@for tier in $(TIERS); do \
		begun=$$(date +%s); $(MAKE) --no-print-directory $$tier || failed=1; \
		times="$$times$$tier took $$(($$(date +%s) - begun)) s\n"; \
	done; printf "$$times"; exit $${failed:-0}
endif

test-gpu: .venv/dev  ## Triton's kernels on a real GPU, then under compute-sanitizer
	LARSKIT_TEST_DEVICE=cuda $(BIN)/python -m pytest $(ARGS) tests/engines/test_agree.py \
		tests/engines/test_triton.py tests/torch/test_triton.py tests/torch/test_gpu.py
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python tests/engines/live/small.py || exit 1; \
	done

environments: .venv/dev  ## of other packages, in the user's cache folder; needs the network once
	$(BIN)/python tests/interop/environments.py

matrix: .venv/dev  ## one fit in every integration; writes docs/matrix.md
	$(BIN)/python tests/interop/matrix.py

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: .venv/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/dev  ## one step of every optimizer, interleaved; creates their environments
	$(BIN)/python benchmarks/step.py $(ARGS)

bench-jax: .venv/dev  ## one compiled step of JAX's optimizers
	$(BIN)/python benchmarks/jax_step.py $(ARGS)

bench-sharded: .venv/dev  ## one step over sharded layers in several processes, and what it sends
	$(BIN)/python benchmarks/sharded.py $(ARGS)

bench-gpu: .venv/dev environments  ## one step of every optimizer on a GPU; ARGS=--dry-run needs none
	$(BIN)/python benchmarks/gpu_step.py $(ARGS)

dist: .venv/dev  ## sdist, and the wheel from it, tried in an environment of its own
	rm -rf dist
	$(BIN)/python -m build --dependency-constraints-txt constraints.txt
	environment=$$(mktemp -d) && trap 'rm -rf "$$environment"' EXIT && \
		$(BIN)/python -m venv "$$environment" && \
		"$$environment/bin/pip" install --quiet -c constraints.txt dist/*.whl && \
		"$$environment/bin/python" -I tests/smoke_wheel.py

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade pip

# An editable install knows the modules that were there when it was made.
.venv/modules: .venv/bin/python FORCE
	@find src -name '*.py' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

.PHONY: FORCE
FORCE:

.venv/app: $(SOURCES)
	$(INSTALL) --editable '.[app]'
	touch $@

.venv/dev: $(SOURCES)
	$(INSTALL) --editable '.[all]' --group dev
	touch .venv/app $@
