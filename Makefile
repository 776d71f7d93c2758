# The laboratory's commands: `make help` lists them.
#
# Lower-case words (`model=vgg16 seed=0,1`) are handed to the program as they were typed; UPPER-CASE ones are knobs of
# this file:
#   PYTHON   the interpreter that .venv is made with (3.11 to 3.13)
#   QUICK    claims only: QUICK=1 tries everything with tiny runs, in minutes
#   ARGS     flags and words that make can't carry, handed on as typed, e.g. ARGS=--check or ARGS="~augment"

PYTHON := python3
ARGS :=
QUICK :=
SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
# A recipe may call make (a test, a script): the words that were typed for this make are not for that one.
unexport MAKEFLAGS MFLAGS

VENV := .venv
BIN := $(VENV)/bin
LOCKS := requirements/base.lock requirements/dev.lock

# ---------------------------------------------------------------------------------------------- words of the user

KNOBS := PYTHON ARGS QUICK
WORDED := train resume sweep evaluate compare report export predict serve cost sync reap ui
PLAIN := setup lock test test-all stress claims bench bench-data bench-guard bench-safeguards lint format docs docs-check help
RENAMED := torture=stress readme=docs readme-check=docs-check

override TYPED := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
override TYPED := $(filter-out $(KNOBS) MAKEFLAGS MAKEOVERRIDES -*%,$(TYPED))

override UPPER := $(foreach letter,A B C D E F G H I J K L M N O P Q R S T U V W X Y Z,$(filter $(letter)%,$(TYPED)))
ifneq ($(strip $(UPPER)),)
$(error $(firstword $(UPPER)) is no knob of this Makefile; use one of: $(KNOBS), or key=value in lower case)
endif

override UNKNOWN := $(filter-out $(WORDED) $(PLAIN),$(MAKECMDGOALS))
ifneq ($(UNKNOWN),)
override NEW := $(patsubst $(firstword $(UNKNOWN))=%,%,$(filter $(firstword $(UNKNOWN))=%,$(RENAMED)))
ifneq ($(NEW),)
$(error make $(firstword $(UNKNOWN)) is called make $(NEW) now)
endif
$(error "$(firstword $(UNKNOWN))" is no target and no key=value word; write e.g. model=$(firstword $(UNKNOWN)), or see: make help)
endif
ifneq ($(strip $(TYPED)),)
ifeq ($(filter $(WORDED),$(MAKECMDGOALS)),)
$(error make $(or $(MAKECMDGOALS),help) takes no key=value words, got $(firstword $(TYPED))=...; the targets that do: $(WORDED))
endif
endif

# Every word in single quotes, a quote inside it as '\'': the shell sees it exactly as it was typed.
override QUOTED = '$(subst ','\'',$(1))'
override WORDS = $(foreach name,$(TYPED),$(call QUOTED,$(name)=$(value $(name)))) $(ARGS)

# --------------------------------------------------------------------------------------------------------- targets

.DEFAULT_GOAL := help
.PHONY: $(WORDED) $(PLAIN)

# The stamp names the interpreter, so that another PYTHON makes the environment anew, and holds it as it was typed:
# without PYTHON, the one that is there stays, also when the lock files have changed. It names the gpu extra, too, so
# that a driver that has come is noticed, and the project's folder: an environment holds absolute paths, so it is made
# anew once the project was moved or copied. Modification times can't tell, as cp -a keeps them. The folder is named by
# a checksum, since make can't handle spaces, % or # in the name of a target.
GPU := $(if $(wildcard /proc/driver/nvidia/version),-gpu)
THERE := $(firstword $(wildcard $(VENV)/.made-with-*))
ifeq ($(origin PYTHON),file)
ifneq ($(THERE),)
PYTHON := $(or $(shell cat $(THERE)),$(PYTHON))
endif
endif
STAMP := $(VENV)/.made-with-$(subst /,_,$(PYTHON))-$(firstword $(shell pwd -P | cksum))$(GPU)

# pip and uv read options from the environment: with UV_SYSTEM_PYTHON, usual in Docker images, uv installs into the
# system's interpreter, whatever VIRTUAL_ENV says. Set-up therefore clears all of their variables but those about how
# packages are fetched: registries and credentials, certificates, network, cache. A list of what stays, rather than of
# what goes, also covers variables that later versions add. Config files are still read, as they may name registries.
override KEPT := \
    UV_DEFAULT_INDEX UV_INDEX UV_INDEX_% UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_%_ENDPOINT_URL \
    UV_CONFIG_FILE UV_NO_CONFIG UV_NO_SYSTEM_CONFIG UV_KEYRING_PROVIDER UV_CREDENTIALS_DIR UV_API_KEY UV_AUTH_TOKEN \
    UV_SYSTEM_CERTS UV_NATIVE_TLS UV_INSECURE_HOST UV_OFFLINE UV_HTTP_% UV_REQUEST_TIMEOUT UV_LOCK_TIMEOUT \
    UV_CACHE_DIR UV_NO_CACHE UV_LINK_MODE UV_CONCURRENT_% \
    PIP_INDEX_URL PIP_PYPI_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX \
    PIP_CONFIG_FILE PIP_KEYRING_PROVIDER PIP_NO_INPUT \
    PIP_CERT PIP_CLIENT_CERT PIP_TRUSTED_HOST PIP_USE_FEATURE PIP_USE_DEPRECATED \
    PIP_PROXY PIP_TIMEOUT PIP_DEFAULT_TIMEOUT PIP_RETRIES PIP_RESUME_RETRIES PIP_CACHE_DIR PIP_NO_CACHE_DIR
override CLEARED = $(filter-out $(KEPT),$(filter UV_% PIP_%,$(.VARIABLES))) \
    VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PYTHONPLATLIBDIR
override ISOLATED = env $(foreach name,$(CLEARED),-u $(call QUOTED,$(name)))
override INSTALL_INTO_VENV = $(ISOLATED) $(BIN)/uv pip install --python $(BIN)/python --system-certs --quiet

setup: $(STAMP) ## make .venv from the lock files (every other target does it by itself when it is missing or stale)
	@echo "environment: $(VENV), $$($(BIN)/python --version)"

$(STAMP): $(LOCKS) requirements/uv.lock requirements/gpu.lock pyproject.toml
	@$(ISOLATED) $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "PYTHON must be Python 3.11 to 3.13, got %d.%d; use e.g. make setup PYTHON=python3.12" % v)'
	@echo "making $(VENV) from the lock files (once)"
	@$(ISOLATED) $(PYTHON) -m venv --clear $(VENV)
	@$(ISOLATED) $(BIN)/python -m pip install --no-user --quiet --disable-pip-version-check --require-hashes -r requirements/uv.lock
	@set -e; locks="$(LOCKS)"; \
	if [ -n "$(GPU)" ]; then \
	    echo "an NVIDIA driver is present: installing the gpu extra"; locks="$$locks requirements/gpu.lock"; \
	fi; \
	for lock in $$locks; do set -- "$$@" -r "$$lock"; done; \
	$(INSTALL_INTO_VENV) --require-hashes "$$@"
	@$(INSTALL_INTO_VENV) --no-deps --no-build-isolation --editable .
	@echo "$(PYTHON)" > $@

# What `make export` writes with, beside the environment: an extra, installed when it is first wanted.
EXPORT := $(VENV)/.extra-export

# What trains with backend=jax, where that is typed; a run that goes on has had it.
JAX := $(if $(findstring jax,$(value backend)),$(VENV)/.extra-jax$(GPU))

$(VENV)/.extra-%: requirements/%.lock $(STAMP)
	@echo "installing the $* extra (once)"
	@$(INSTALL_INTO_VENV) --require-hashes -r $<
	@touch $@

train: $(STAMP) $(JAX) ## train, evaluate, record: make train model=vgg16_inception [key=value ...]
	@$(BIN)/python -m train $(WORDS)

resume: $(STAMP) ## go on with an unfinished run, to the same bits: make resume [run=runs/latest] [epochs=20]
	@$(BIN)/python -m train.resume $(WORDS)

sweep: $(STAMP) $(JAX) ## every combination of comma-separated values: make sweep model=vgg16,vgg16_inception seed=0,1,2
	@$(BIN)/python -m train --multirun $(WORDS)

evaluate: $(STAMP) ## a run's best weights on a whole split or other data: make evaluate run=runs/latest [data=folder data.root=...]
	@$(BIN)/python -m train.evaluate $(WORDS)

compare: $(STAMP) ## mean and spread over seeds, costs, best buys: make compare experiment=inception [baseline=model=vgg16]
	@$(BIN)/python -m train.compare $(WORDS)

report: $(STAMP) ## a run on one page, written anew: make report [run=runs/latest]
	@$(BIN)/python -m train.report $(WORDS)

export: $(EXPORT) ## a run's network for others: make export run=runs/latest format=keras|saved_model|onnx|tflite|all
	@$(BIN)/python -m train.export $(WORDS)

predict: $(STAMP) ## what a run's network says of pictures: make predict run=runs/latest images=PATH [top=5] [output=jsonl]
	@$(BIN)/python -m train.predict $(WORDS)

serve: $(STAMP) ## MLflow's model server on 127.0.0.1: make serve run=runs/latest [port=5001]
	@$(BIN)/python -m train.serve $(WORDS)

cost: $(STAMP) ## layers, parameters, multiply-accumulates, activations: make cost model=inception_v3 [model.width=0.5]
	@$(BIN)/python -m train.cost $(WORDS)

ui: $(STAMP) ## the MLflow UI on 127.0.0.1: make ui [port=5000]
	@$(BIN)/python -m train.ui $(WORDS)

sync: $(STAMP) ## complete the MLflow record of a run from its journal: make sync run=runs/latest
	@$(BIN)/python -m train.sync $(WORDS)

reap: $(STAMP) ## mark the runs in MLflow whose process is gone: make reap [uri=...] [minutes=10]
	@$(BIN)/python -m train.reap $(WORDS)

test: $(EXPORT) $(VENV)/.extra-jax ## the default tests (under 8 minutes on 2 quiet cores)
	@$(BIN)/python -m pytest -m "not slow" -n 3 $(ARGS)

test-all: $(EXPORT) $(VENV)/.extra-jax $(VENV)/.extra-ray ## all tests, the long ones too (ARGS="-m slow -n 2": those alone)
	@$(BIN)/python -m pytest $(ARGS)

stress: $(STAMP) ## kill real runs 200 times and compare them with untouched ones (about 45 minutes on 2 cores; ARGS="--kills 20")
	@$(BIN)/python scripts/stress/runs.py $(ARGS)

claims: $(STAMP) ## ten claims of the Inception papers, run and judged; goes on where it was (hours; QUICK=1: minutes)
	@$(BIN)/python scripts/claims/claims.py $(if $(QUICK),--quick) $(ARGS)

bench-data: $(STAMP) ## how fast images come, beside bare decoding, Keras and PyTorch (about 25 minutes)
	@$(BIN)/python scripts/benchmarks/data_loading.py $(ARGS)

bench: $(STAMP) ## how fast training is, beside Keras's fit, and PyTorch by ARGS="--torch PYTHON" (about 40 minutes on a quiet machine)
	@$(BIN)/python scripts/benchmarks/training.py $(ARGS)

bench-guard: $(STAMP) ## whether training is still as fast beside Keras's fit as the kept figures say (about 5 minutes)
	@$(BIN)/python scripts/benchmarks/training.py --guard $(ARGS)

bench-safeguards: $(STAMP) ## what the safeguards cost, measured side by side (about 20 minutes on a quiet machine)
	@$(BIN)/python scripts/benchmarks/safeguards.py $(ARGS)

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP) ## write the README's tables anew from the commands they name
	@$(BIN)/python scripts/docs/readme.py

docs-check: $(STAMP) ## run every command of the README (ARGS=--quick: all but the long ones)
	@$(BIN)/python scripts/docs/readme.py --check $(ARGS)

lock: $(STAMP) ## resolve the dependencies anew into the lock files
	@$(ISOLATED) $(BIN)/python scripts/lock.py

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-16s %s\n' "$$name" "$$text"; done
