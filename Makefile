# make serve   a local fleet with the bundled model (ARGS="…" is passed on to `baton serve`)
# make test    the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
COMMA := ,

# Tests side by side: one more than there are cores, for some of them wait.
JOBS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
# Each of the many processes that a suite starts would compile all of Baton.
export PYTHONDONTWRITEBYTECODE :=

# The whole suite, or with ARGS only what they say: fleets of real processes have the machine to
# themselves, all else runs side by side. $(1): marks to choose by.
define suite
$(if $(ARGS),\
$(BIN)/python -m pytest $(1) $(ARGS),\
$(BIN)/python -m pytest $(1) --ignore tests/e2e -n $(JOBS) --dist worksteal --durations 15 && \
$(BIN)/python -m pytest $(1) tests/e2e --durations 15)
endef

.PHONY: serve test test-slow test-gpu test-contract test-compose install dev lint protos clean

serve: install
	@exec $(BIN)/baton serve $(ARGS)

test: dev
	$(call suite)

test-slow: dev
	$(call suite,-m slow)

# On a machine with a CUDA device: are tokens and payloads right, then how fast.
test-gpu: dev
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu $(ARGS)
	$(BIN)/python -m bench.gpu

# The API as langchain-openai and litellm use it.
test-contract: dev
	$(call pip_install,.[contract])
	$(BIN)/python -m pytest -m contract $(ARGS)

test-compose: dev
	$(BIN)/python -m pytest -m compose $(ARGS)

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(wildcard kernels/ops/*.[ch]) | $(BIN)/python
	$(call pip_install,.)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call pip_install,.[dev$(COMMA)ucx])
	@touch $@

# pip compiles to byte code in one process, which is half of an installation; this uses all cores.
define pip_install
@echo "installing $(1) into $(VENV): minutes the first time"
@$(BIN)/python -m pip install -q --no-compile -e '$(1)'
@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
endef

# The folders are mapped into one package at install time, so imports and types are checked on an
# installed copy.
lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/copy .
	cd build/copy && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml
	cd build/copy && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p baton

protos: dev
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto \
	  --grpc_python_out=proto proto/baton/v1/*.proto

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
