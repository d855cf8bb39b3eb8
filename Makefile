# The two commands: `make demo` and `make test`. Both set everything up in .venv; neither needs a terminal nor root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready

.PHONY: help demo test test-long gpu lint types stubs clean

help:
	@echo 'make demo       set up, start both services with the bundled model, chat, 32 concurrent requests, stop'
	@echo 'make test       set up, lint, types, tests (ten minutes at most on two cores)'
	@echo 'make test-long  the slow rest: the whole parity matrix, the whole demo-model check'
	@echo 'make gpu        check and time the cuda backend and the services on it; without a GPU, say what was skipped'
	@echo 'make stubs      generate protos/*_pb2* anew from the .proto files'
	@echo 'make clean      remove .venv and caches'

SOURCES := pyproject.toml hatch_build.py $(wildcard services/decoder/ops/native/src/*)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'leasehold needs Python 3.11 or later; say make PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo 'the venv module is missing; on Debian: apt-get install python3-venv'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'  # 25.1: --group

# What users install: the services, the clients and the compiled kernels. An editable install compiles them in place.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[decoder]'
	@touch $@

# The same and what the checks need, resolved together: grpcio-tools 1.76 wants an older protobuf than users get.
$(READY): $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[decoder]' --group dev
	@touch $(INSTALLED) $@

demo: $(INSTALLED)
	$(BIN)/python -m clients.demo

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-long: $(READY)
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

gpu: $(READY)
	@! command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install --quiet --editable '.[decoder-cuda]'
	$(BIN)/python -m tests.bench.gpu
	$(BIN)/python -m tests.bench.gpu_services

stubs: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m protos.generate

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
