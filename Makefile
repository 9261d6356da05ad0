# Two commands do everything on a machine with Python 3.11, make and git:
#   make demo   the main job: one cold load, then instances that are filled from it
#   make test   the tests
# Both create .venv first. Where pip's index offers only CUDA builds of torch, point pip at PyTorch's CPU wheel index
# (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL) before the first run.
PYTHON ?= python3.11
VENV ?= .venv
TORCH_VERSION := 2.13.0
RUN := $(VENV)/bin/
STAMP := $(VENV)/.weight-broker-installed

.PHONY: help demo test test-slow lint types generate check-generated benchmark clean
.DEFAULT_GOAL := help

help:  ## show the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@echo "== creating $(VENV) with the CPU build of torch $(TORCH_VERSION) and weight-broker (about 1 GB, once)"
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)pip install --quiet --upgrade pip
	$(RUN)pip install --quiet torch==$(TORCH_VERSION)
	$(RUN)pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## run the main job: one cold load, then instances filled from it
	$(RUN)weight-broker demo $(DEMO_ARGUMENTS)

test: $(STAMP)  ## run the tests
	$(RUN)pytest -m 'not slow' $(PYTEST_ARGUMENTS)

test-slow: $(STAMP)  ## run the tests that take minutes
	$(RUN)pytest -m slow $(PYTEST_ARGUMENTS)

lint: $(STAMP)  ## ruff, buf lint and the breaking-change check
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)buf lint
	$(RUN)buf format --diff --exit-code
	$(RUN)buf breaking --against proto/baseline.binpb

types: $(STAMP)  ## mypy --strict
	$(RUN)mypy

# Generated with the oldest supported grpcio-tools, so that old hosts can run the code (docs/ARCHITECTURE.md).
.venv-codegen/bin/python:
	$(PYTHON) -m venv .venv-codegen
	.venv-codegen/bin/pip install --quiet grpcio-tools==1.62.3 mypy-protobuf==3.6.0 protobuf==4.25.9 'setuptools<81'

generate: .venv-codegen/bin/python  ## regenerate client/weight_broker/v1 from proto/
	PATH="$(CURDIR)/.venv-codegen/bin:$$PATH" .venv-codegen/bin/python -m grpc_tools.protoc -Iproto --python_out=client \
	  --grpc_python_out=client --mypy_out=client --mypy_grpc_out=client proto/weight_broker/v1/*.proto
	rm -f $(foreach name,weight_set resources attach error_details,client/weight_broker/v1/$(name)_pb2_grpc.py*)

check-generated: generate  ## fail if the checked-in generated code differs from what proto/ gives
	git diff --exit-code -- client/weight_broker/v1
	test -z "$$(git status --porcelain -- client/weight_broker/v1)"

benchmark: $(STAMP)  ## measure the budgets of docs/ARCHITECTURE.md and print each as measured / budget
	$(RUN)python -m benchmarks

clean:  ## remove the virtual environments
	rm -rf $(VENV) .venv-codegen
