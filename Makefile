# The commands of the laboratory; `make help` lists them.
#
# Every command explains its keys: make evaluate ARGS=--help
#
# Lower-case arguments (`model=vgg16 seed=0,1`) are passed to the program unchanged; UPPER-CASE ones are variables of
# this file:
#   PYTHON   the interpreter that .venv is created with (3.11 to 3.13)
#   QUICK    claims only: QUICK=1 tries everything with tiny runs, in minutes
#   ARGS     flags and arguments that make cannot pass, forwarded unchanged, e.g. ARGS=--check or ARGS="~augment"

PYTHON := python3
ARGS :=
QUICK :=
SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
# A recipe may call make (a test, a script), which must not inherit the arguments of this make.
unexport MAKEFLAGS MFLAGS

VENV := .venv
BIN := $(VENV)/bin
LOCKS := requirements/base.lock requirements/dev.lock

# ------------------------------------------------------------------------------------------ arguments of the user

MAKE_VARIABLES := PYTHON ARGS QUICK
TARGETS_WITH_KEYS := train resume sweep evaluate compare report export predict serve cost sync reap ui
TARGETS_WITHOUT_KEYS := setup lock test test-all stress claims bench bench-data bench-guard bench-safeguards lint format docs docs-check help
RENAMED := torture=stress readme=docs readme-check=docs-check

# Puts every argument in single quotes, a quote inside it as '\'': the shell sees it exactly as it was typed.
override QUOTED = '$(subst ','\'',$(1))'
# The name in the list $(2) that the word $(1) was meant to be; empty if it resembles none, or without Python.
override NEAREST = $(shell $(PYTHON) -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1].lower(), sys.argv[2].split(), 1))' $(call QUOTED,$(1)) $(call QUOTED,$(2)) 2>/dev/null)

override ARGUMENT_NAMES := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
override ARGUMENT_NAMES := $(filter-out $(MAKE_VARIABLES) MAKEFLAGS MAKEOVERRIDES -*%,$(ARGUMENT_NAMES))

override UPPER_CASE_NAMES := $(foreach letter,A B C D E F G H I J K L M N O P Q R S T U V W X Y Z,$(filter $(letter)%,$(ARGUMENT_NAMES)))
ifneq ($(strip $(UPPER_CASE_NAMES)),)
$(error unknown make variable $(firstword $(UPPER_CASE_NAMES)); use one of: $(MAKE_VARIABLES), or key=value in lower case)
endif

override UNKNOWN := $(filter-out $(TARGETS_WITH_KEYS) $(TARGETS_WITHOUT_KEYS),$(MAKECMDGOALS))
ifneq ($(UNKNOWN),)
override NEW_NAME := $(patsubst $(firstword $(UNKNOWN))=%,%,$(filter $(firstword $(UNKNOWN))=%,$(RENAMED)))
ifneq ($(NEW_NAME),)
$(error make $(firstword $(UNKNOWN)) is now called make $(NEW_NAME))
endif
override MEANT := $(call NEAREST,$(firstword $(UNKNOWN)),$(TARGETS_WITH_KEYS) $(TARGETS_WITHOUT_KEYS))
ifneq ($(MEANT),)
$(error unknown target "$(firstword $(UNKNOWN))"; did you mean: make $(MEANT))
endif
$(error "$(firstword $(UNKNOWN))" is neither a target nor key=value; use e.g. model=$(firstword $(UNKNOWN)), or see: make help)
endif
ifneq ($(strip $(ARGUMENT_NAMES)),)
ifeq ($(filter $(TARGETS_WITH_KEYS),$(MAKECMDGOALS)),)
$(error make $(or $(MAKECMDGOALS),help) takes no key=value arguments, got $(firstword $(ARGUMENT_NAMES))=...; targets that do: $(TARGETS_WITH_KEYS))
endif
endif

override FORWARDED = $(foreach name,$(ARGUMENT_NAMES),$(call QUOTED,$(name)=$(value $(name)))) $(ARGS)

# --------------------------------------------------------------------------------------------------------- targets

.DEFAULT_GOAL := help
.PHONY: $(TARGETS_WITH_KEYS) $(TARGETS_WITHOUT_KEYS)

# The name of the stamp contains the interpreter, so that another PYTHON recreates the environment, and its content is
# that interpreter as it was typed: without PYTHON it is used again, also after the lock files changed. The name contains
# the gpu extra, too, so that a newly installed driver is noticed, and the project's folder: an environment holds absolute
# paths, so it is recreated after the project was moved or copied. Modification times do not show that, as cp -a keeps
# them. A checksum stands for the folder, since make cannot handle spaces, % or # in the name of a target.
GPU := $(if $(wildcard /proc/driver/nvidia/version),-gpu)
OLD_STAMP := $(firstword $(wildcard $(VENV)/.made-with-*))
ifeq ($(origin PYTHON),file)
ifneq ($(OLD_STAMP),)
PYTHON := $(or $(shell cat $(OLD_STAMP)),$(PYTHON))
endif
endif
STAMP := $(VENV)/.made-with-$(subst /,_,$(PYTHON))-$(firstword $(shell pwd -P | cksum))$(GPU)

# pip and uv read options from the environment: with UV_SYSTEM_PYTHON, common in Docker images, uv installs into the
# system's interpreter, whatever VIRTUAL_ENV is. Set-up therefore clears all of their variables but those about fetching
# packages: registries and credentials, certificates, network, cache. A list of the variables to keep, rather than to
# clear, also covers those that later versions add. Config files are still read, as they may name registries.
override KEPT_VARIABLES := \
    UV_DEFAULT_INDEX UV_INDEX UV_INDEX_% UV_EXTRA_INDEX_URL UV_FIND_LINKS UV_%_ENDPOINT_URL \
    UV_CONFIG_FILE UV_NO_CONFIG UV_NO_SYSTEM_CONFIG UV_KEYRING_PROVIDER UV_CREDENTIALS_DIR UV_API_KEY UV_AUTH_TOKEN \
    UV_SYSTEM_CERTS UV_NATIVE_TLS UV_INSECURE_HOST UV_OFFLINE UV_HTTP_% UV_REQUEST_TIMEOUT UV_LOCK_TIMEOUT \
    UV_CACHE_DIR UV_NO_CACHE UV_LINK_MODE UV_CONCURRENT_% \
    PIP_INDEX_URL PIP_PYPI_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_NO_INDEX \
    PIP_CONFIG_FILE PIP_KEYRING_PROVIDER PIP_NO_INPUT \
    PIP_CERT PIP_CLIENT_CERT PIP_TRUSTED_HOST PIP_USE_FEATURE PIP_USE_DEPRECATED \
    PIP_PROXY PIP_TIMEOUT PIP_DEFAULT_TIMEOUT PIP_RETRIES PIP_RESUME_RETRIES PIP_CACHE_DIR PIP_NO_CACHE_DIR
override CLEARED = $(filter-out $(KEPT_VARIABLES),$(filter UV_% PIP_%,$(.VARIABLES))) \
    VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PYTHONPLATLIBDIR
override ISOLATED = env $(foreach name,$(CLEARED),-u $(call QUOTED,$(name)))
override INSTALL_INTO_VENV = $(ISOLATED) $(BIN)/uv pip install --python $(BIN)/python --system-certs --quiet

setup: $(STAMP) ## create .venv from the lock files (all other targets do this when it is missing or stale)
	@echo "environment: $(VENV), $$($(BIN)/python --version)"

$(STAMP): $(LOCKS) requirements/uv.lock requirements/gpu.lock pyproject.toml
	@$(ISOLATED) $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "PYTHON must be Python 3.11 to 3.13, got %d.%d; use e.g. make setup PYTHON=python3.12" % v)'
	@echo "creating $(VENV) from the lock files (once)"
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

# The packages of `make export`: an extra, installed on first use.
EXPORT := $(VENV)/.extra-export

# The packages of backend=jax, if that is typed; for a run that is resumed they are installed already.
JAX := $(if $(findstring jax,$(value backend)),$(VENV)/.extra-jax$(GPU))

$(VENV)/.extra-%: requirements/%.lock $(STAMP)
	@echo "installing the $* extra (once)"
	@$(INSTALL_INTO_VENV) --require-hashes -r $<
	@touch $@

train: $(STAMP) $(JAX) ## train, evaluate and log to MLflow: make train model=vgg16_inception [key=value ...]
	@$(BIN)/python -m train $(FORWARDED)

resume: $(STAMP) ## resume an unfinished run, bit for bit: make resume [run=runs/latest] [epochs=20]
	@$(BIN)/python -m train.resume $(FORWARDED)

sweep: $(STAMP) $(JAX) ## run every combination of comma-separated values: make sweep model=vgg16,vgg16_inception seed=0,1,2
	@$(BIN)/python -m train --multirun $(FORWARDED)

evaluate: $(STAMP) ## evaluate a run's best weights on a split or on other data: make evaluate run=runs/latest [data=folder data.root=...]
	@$(BIN)/python -m train.evaluate $(FORWARDED)

compare: $(STAMP) ## compare runs: mean and spread over seeds, cost, Pareto front: make compare experiment=inception [baseline=model=vgg16]
	@$(BIN)/python -m train.compare $(FORWARDED)

report: $(STAMP) ## rewrite the one-page report of a run: make report [run=runs/latest]
	@$(BIN)/python -m train.report $(FORWARDED)

export: $(EXPORT) ## export a trained model: make export run=runs/latest format=keras|saved_model|onnx|tflite|all
	@$(BIN)/python -m train.export $(FORWARDED)

predict: $(STAMP) ## classify images with a trained model: make predict run=runs/latest images=PATH [top=5] [output=jsonl]
	@$(BIN)/python -m train.predict $(FORWARDED)

serve: $(STAMP) ## serve a model with MLflow on 127.0.0.1: make serve run=runs/latest [port=5001]
	@$(BIN)/python -m train.serve $(FORWARDED)

cost: $(STAMP) ## count layers, parameters, multiply-accumulates, activations: make cost model=inception_v3 [model.width=0.5]
	@$(BIN)/python -m train.cost $(FORWARDED)

ui: $(STAMP) ## open the MLflow UI on 127.0.0.1: make ui [port=5000]
	@$(BIN)/python -m train.ui $(FORWARDED)

sync: $(STAMP) ## complete the MLflow record of a run from its journal: make sync run=runs/latest
	@$(BIN)/python -m train.sync $(FORWARDED)

reap: $(STAMP) ## mark stale runs in MLflow, whose process is gone: make reap [uri=...] [minutes=10]
	@$(BIN)/python -m train.reap $(FORWARDED)

test: $(EXPORT) $(VENV)/.extra-jax ## run the default tests (8 to 9 minutes on 2 idle cores)
	@$(BIN)/python -m pytest -m "not slow" -n 3 $(ARGS)

test-all: $(EXPORT) $(VENV)/.extra-jax $(VENV)/.extra-ray ## run all tests, including the slow ones (ARGS="-m slow -n 2": only those)
	@$(BIN)/python -m pytest $(ARGS)

stress: $(STAMP) ## kill real runs 200 times and compare them with undisturbed ones (about 45 minutes on 2 cores; ARGS="--kills 20")
	@$(BIN)/python scripts/stress/runs.py $(ARGS)

claims: $(STAMP) ## test ten claims of the Inception papers; run again to resume (hours; QUICK=1: minutes)
	@$(BIN)/python scripts/claims/claims.py $(if $(QUICK),--quick) $(ARGS)

bench-data: $(STAMP) ## measure data loading beside bare decoding, Keras and PyTorch (about 25 minutes)
	@$(BIN)/python scripts/benchmarks/data_loading.py $(ARGS)

bench: $(STAMP) ## measure training speed beside Keras's fit, and PyTorch with ARGS="--torch PYTHON" (about 40 minutes on an idle machine)
	@$(BIN)/python scripts/benchmarks/training.py $(ARGS)

bench-guard: $(STAMP) ## check training speed relative to Keras's fit against the stored figures (about 5 minutes)
	@$(BIN)/python scripts/benchmarks/training.py --guard $(ARGS)

bench-safeguards: $(STAMP) ## measure the cost of the safeguards, side by side (about 20 minutes on an idle machine)
	@$(BIN)/python scripts/benchmarks/safeguards.py $(ARGS)

lint: $(STAMP) ## run ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## format the code with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP) ## regenerate the README's tables
	@$(BIN)/python scripts/docs/readme.py

docs-check: $(STAMP) ## run every command of the README (ARGS=--quick: all but the slow ones)
	@$(BIN)/python scripts/docs/readme.py --check $(ARGS)

lock: $(STAMP) ## update the lock files from the dependencies
	@$(ISOLATED) $(BIN)/python scripts/lock.py

help: ## list all commands
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-16s %s\n' "$$name" "$$text"; done
	@echo; echo 'the keys of a command with keys, their types and defaults: make TARGET ARGS=--help'
