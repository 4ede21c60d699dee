# make demo    set up .venv, build, segment a generated clip, print J and F
# make test    the whole test suite
# make bench   the benchmarks of this machine
# make sanitize  the native library's tests under AddressSanitizer and UndefinedBehaviorSanitizer
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench sanitize clean

demo: $(VENV)/.built
	$(BIN)/dmm-fast demo --out demo

test: $(VENV)/.built
	$(BIN)/python -m pytest

bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only

$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# The test process must start with the sanitizer's runtime; leaks of Python itself are not ours to report.
sanitize: $(VENV)/.installed
	$(BIN)/python tests/sanitize.py

clean:
	rm -rf build dist *.egg-info dmm_fast/lib demo
