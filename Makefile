# make demo   an HTTPS proxy on https://127.0.0.1:8443 whose key only an isolated worker process holds
# make test   everything, on real sockets, processes and tokens: make test ARGS="-x -k custody"
# make help   the other targets

PYTHON ?= python3
BIN := .venv/bin
PYX_SOURCES := $(shell find tlsproxy hsm -name '*.pyx')
C_SOURCES := $(filter-out $(PYX_SOURCES:.pyx=.c),$(shell find tlsproxy hsm perf tests -name '*.[ch]'))
EXTENSION_SOURCES := $(PYX_SOURCES) $(filter tlsproxy/% hsm/%,$(C_SOURCES))
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build system-packages demo test lint format conformance asan abuse bench soak clean

help:
	@echo "make demo         run the demo until Ctrl-C (ARGS=\"--port 9443\" and the like are passed on)"
	@echo "make test         run all tests (ARGS are pytest's)"
	@echo "make conformance  run the HTTP conformance corpus through the real proxy"
	@echo "make asan         run the engine's tests with its C code under AddressSanitizer and UBSan"
	@echo "make bench        compare with other servers; writes PERFORMANCE.md and perf/results (8 minutes)"
	@echo "make abuse        attack the proxy in eighteen ways, and see what honest clients notice (minutes)"
	@echo "make soak         count 10,000 mixed handshakes exactly; 1 GB both ways past a slow reader, and the memory for it"
	@echo "make lint         ruff, mypy --strict, import layers, clang-format"
	@echo "make format       format Python and C"
	@echo "make build        set up .venv and compile the extension"
	@echo "make clean        remove .venv and what was built"

# The build tools live in .venv too, so that a rebuild after an edit needs no network.
.venv/build-tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later expected; got %d.%d" % sys.version_info[:2])'
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) 'setuptools>=77' 'Cython>=3.1'
	@touch $@

.venv/installed: .venv/build-tools $(EXTENSION_SOURCES)
	@$(PIP_INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@

.venv/lint-tools: .venv/installed
	@$(PIP_INSTALL) --no-build-isolation --editable '.[test,lint]'
	@touch $@

build: .venv/installed

system-packages:
	@tests/system-packages.sh

demo: build
	@$(BIN)/tlsproxy demo $(ARGS)

test: system-packages build
	@$(BIN)/python -m pytest $(ARGS)

conformance: build
	@$(BIN)/python -m pytest tests/conformance $(ARGS)

asan: system-packages build
	@tests/asan/run.sh

abuse: system-packages build
	@$(BIN)/python -m tests.abuse $(ARGS)

bench: system-packages build
	@tests/system-packages.sh perf/system-packages.txt
	@$(BIN)/python -m perf compare --output perf/results --update PERFORMANCE.md $(ARGS)

soak: system-packages build
	@HANDSHAKES=10000 $(BIN)/python -m pytest tests/observability/test_exact_counts.py $(ARGS)
	@$(BIN)/python -m tests.soak

lint: system-packages .venv/lint-tools
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@clang-format --dry-run -Werror $(C_SOURCES)

format: system-packages .venv/lint-tools
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@clang-format -i $(C_SOURCES)

clean:
	rm -rf .venv build *.egg-info $(PYX_SOURCES:.pyx=.c)
	find tlsproxy hsm -name '*.so' -delete
