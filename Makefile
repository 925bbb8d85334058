# Each target sets up what it needs by itself. The environment is .venv, installed from envs/local.lock.
#
#   make demo    forecast the demo study, run it on this machine and print its table
#   make test    run the suite, but for what takes long; with MARKED='not exhaustive' as CI runs it
#   make test-all
#                run all of it, every pair of techniques too
#   make techniques-ran
#                every pair of techniques on the CPU, written down for docs/techniques.md
#   make gpu-check
#                on a machine with a GPU: the tests of tests/gpu and a small measured matrix, into benchmarks/results/gpu;
#                it takes .venv-gpu where there is one, else PYTHON with whatever packages that has; MINUTES=20 of matrix
#   make gpu-wheels
#                for a machine that can fetch nothing: all that gpu-check needs beside PyTorch, into build/gpu-wheels (some
#                250 MB), to be carried there; gpu-check takes them. GPU_PYTHON_VERSION=3.12 where it has another Python
#   make check   format, lint, types, spelling, workflow, generated files
#   make format  put format and generated files in order
#   make bench   PART=driver and PART=pending measure on the test cluster, PART=predictor compares predictions with published tables,
#                PART=report measures how long the report of 100,000 runs takes, PART=overhead what our instruments cost,
#                PART=launches what it costs the host to start an operation
#   make synthetic
#                the report of a synthetic study, to look at every figure: build/synthetic/results/report/index.html
#   make slurm-up, make slurm-down
#                a real SLURM on this host, for tests (Debian, root); refuses where there is another one
#   make lock    choose versions anew, from pyproject.toml
#   make gpu-env GPU_ENV=<folder> TORCH_INDEX=<url>
#                an environment for training on GPUs, with the same versions and the CUDA build of torch of that index;
#                FLASH_ATTN=<version> compiles flash-attn for it, once (CUDA's nvcc is needed)
#
# Where the package index offers torch's CUDA build first, give the index of torch's CPU builds to save several GB:
#   make demo TORCH_INDEX=<url>

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
LOCK := envs/local.lock
PLUGIN := src/snakemake_executor_plugin_submitit
INSTALLED := $(VENV)/finetune-study.lock
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(or $(shell sed -n "s/^\(torch==.*\)/\1/p" $(LOCK)),torch==2.13.0)
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
GPU_ENV ?= .venv-gpu
FLASH_ATTN ?=
GPU_PYTHON := $(GPU_ENV)/bin/python
EXTRAS := controller,training,development

.PHONY: demo test test-all techniques-ran gpu-check gpu-wheels check bench synthetic slurm-up slurm-down format lock env gpu-env clean

env: $(INSTALLED)

$(INSTALLED): $(LOCK) pyproject.toml $(PLUGIN)/pyproject.toml
	@echo "make: installing the environment into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than Python 3.11; name another with PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: could not make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	@$(PIP) install --quiet $(TORCH_FROM) $(TORCH)
	@$(PIP) install --quiet --use-pep517 --requirement $(LOCK)
	@$(PIP) install --quiet --no-deps --editable . --editable $(PLUGIN)
	@cp $(LOCK) $@

demo: env
	@$(BIN)/snakemake --cores all forecast && $(BIN)/snakemake --cores all; status=$$?; $(BIN)/finetune-study summary; exit $$status

SHARED := --numprocesses 3 --dist loadscope --no-loadscope-reorder
MARKED ?= not long and not exhaustive
test: env
	@$(BIN)/python -m pytest $(SHARED) -m '$(MARKED)'

test-all: MARKED :=
test-all: test

techniques-ran: env
	@TECHNIQUES_RAN=benchmarks/results/techniques-cpu-$$(date +%F).json $(BIN)/python -m pytest -m '' tests/training/test_pairs.py
	@$(BIN)/finetune-study techniques-docs

GPU_WHEELS ?= build/gpu-wheels
GPU_PYTHON_VERSION ?= $(shell $(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".")')
gpu-wheels: env
	@$(BIN)/python benchmarks/wheels.py $(GPU_WHEELS) --python $(GPU_PYTHON_VERSION)

# Where there is no .venv-gpu: an environment that sees this project, what was carried, and all that PYTHON has. Ranks take
# no PYTHONPATH over, and `--system-site-packages` would not show the packages of a PYTHON that is an environment itself.
CHECKED := build/gpu-check
CHECK_PYTHON := $(or $(wildcard $(GPU_PYTHON)),$(CHECKED)/bin/python)
MINUTES ?= 20
gpu-check: $(if $(wildcard $(GPU_PYTHON)),,$(CHECKED))
	@PYTHONPATH=. $(CHECK_PYTHON) benchmarks/gpu.py --check
	@rm -f build/techniques-gpu.json; status=0; \
	 if $(CHECK_PYTHON) -c 'import pytest' 2>/dev/null; then \
	   TECHNIQUES_RAN=build/techniques-gpu.json $(CHECK_PYTHON) -m pytest -m gpu tests/gpu || status=$$?; \
	 else echo "make: $(CHECK_PYTHON) has no pytest: the measured matrix alone"; fi; \
	 PYTHONPATH=. $(CHECK_PYTHON) benchmarks/gpu.py --write benchmarks/results/gpu --ran build/techniques-gpu.json --minutes $(MINUTES) && exit $$status

.PHONY: $(CHECKED)
$(CHECKED):
	@rm -rf $@ && $(PYTHON) -m venv --without-pip $@
	@{ echo $(CURDIR)/src; $(PYTHON) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")'; } \
	   > $$($@/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gpu-check.pth
	@test -z "$(wildcard $(GPU_WHEELS)/*.whl)" || $(PYTHON) -m pip --python $@/bin/python install --quiet \
	   --disable-pip-version-check --no-index --no-deps $(GPU_WHEELS)/*.whl

check: env
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/codespell
	@$(BIN)/snakefmt --check Snakefile workflow
	@$(BIN)/snakemake --lint
	@$(BIN)/finetune-study config-docs --check
	@$(BIN)/finetune-study techniques-docs --check

PART ?= driver
bench: env $(if $(filter driver pending,$(PART)),slurm-up)
	@$(BIN)/python benchmarks/$(PART).py --write benchmarks/results

synthetic: env
	@$(BIN)/python benchmarks/synthetic.py build/synthetic
	@$(BIN)/finetune-study report -c build/synthetic/config.yaml -r build/synthetic/results

slurm-up:
	@tests/slurm/cluster.sh up

slurm-down:
	@tests/slurm/cluster.sh down

format: env
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/snakefmt Snakefile workflow
	@$(BIN)/finetune-study config-docs
	@$(BIN)/finetune-study techniques-docs

lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip install --quiet $(TORCH_FROM) $(TORCH)
	@build/lock/bin/python -m pip install --quiet '.[$(EXTRAS)]' ./$(PLUGIN)
	@{ echo "# Versions of the demo's and the tests' environment; made by 'make lock'."; \
	   build/lock/bin/python -m pip freeze --exclude finetune-study --exclude snakemake-executor-plugin-submitit | sed 's/+cpu$$//'; } > $(LOCK)

gpu-env: $(GPU_ENV)/finetune-study.lock

$(GPU_ENV)/finetune-study.lock: $(LOCK) pyproject.toml
	@test -n "$(TORCH_INDEX)" || { echo "make: name the index of torch's builds for your GPUs: TORCH_INDEX=<url>; a V100 needs CUDA 12.6, see envs/README.md"; exit 1; }
	@echo "make: installing an environment for training into $(GPU_ENV) (several GB)"
	@$(PYTHON) -m venv $(GPU_ENV)
	@$(GPU_PYTHON) -m pip install --quiet $(TORCH_FROM) $(TORCH)
	@$(GPU_PYTHON) -m pip install --quiet --use-pep517 --constraint $(LOCK) --editable '.[training]' pytest
	@test -z "$(FLASH_ATTN)" || $(GPU_PYTHON) -m pip install --quiet --no-build-isolation flash-attn==$(FLASH_ATTN)
	@cp $(LOCK) $@
	@$(GPU_PYTHON) -c 'import torch; print("make: torch", torch.__version__, "for CUDA", torch.version.cuda)'

clean:
	rm -rf $(VENV) build .snakemake logs
