# make demo | test      everything from a fresh machine with python3, a C++ compiler and make
# make lint | bench     style and types; timings of every operator against PyTorch
# make sanitize         the C++ tests under AddressSanitizer and UBSan
# make test-wide        the kernel tests with the AVX-512 code paths, on any AVX2 machine
# make build | clean    only the installation into .venv; remove it and everything built
#
# PYTHON=python3.12 picks the interpreter, TORCH="torch==2.12.0" the PyTorch, TORCH_INDEX= the index it may
# come from. P2PFAST_CUDA=0|1|auto is described in setup.py.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Without an NVIDIA driver the CPU build is enough, several GB smaller than the default one.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export OMP_NUM_THREADS ?= 2
# Processes that run tests side by side; empty for one.
TEST_PROCESSES ?= -n auto --maxprocesses 4 --dist worksteal

NATIVE := $(shell find csrc cmake -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cmake' \))

.PHONY: demo test test-wide lint bench sanitize build clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/p2pfast demo

test: build
	$(BIN)/python -m pytest -q $(TEST_PROCESSES) tests

bench: build
	mkdir -p build
	$(BIN)/python -m pytest -q benchmarks --benchmark-json=build/benchmarks.json

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p p2pfast
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

sanitize: $(VENV)/tools.stamp
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DP2PFAST_PYTHON=OFF -DP2PFAST_TESTS=ON -DP2PFAST_SANITIZE=ON -DP2PFAST_EMULATE_WIDE=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/csrc/tests/p2pfast_tests

test-wide: build
	P2PFAST_EMULATE_WIDE=1 P2PFAST_CUDA=0 $(BIN)/python setup.py -q build_ext --build-lib build/wide
	P2PFAST_TEST_MODULE=$$(echo build/wide/p2pfast/_C.*.so) $(BIN)/python -m pytest -q $(TEST_PROCESSES) tests/ops tests/native

build: $(VENV)/installed.stamp

# The environment and what the native build needs; no torch.
$(VENV)/tools.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "p2pfast needs Python 3.10 or later; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel "pybind11>=2.13" ninja "cmake>=3.24"
	touch $@

# Alone, so that no other requirement decides which build of torch is fetched and the extra index serves
# nothing else; its dependencies come with p2pfast's. Without that index (no network route to it, say) pip
# warns and takes what the usual ones have.
$(VENV)/torch.stamp: $(VENV)/tools.stamp
	@echo "installing $(TORCH) into $(VENV)"
	$(PIP) install --no-deps --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	touch $@

$(VENV)/installed.stamp: $(VENV)/torch.stamp pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@echo "installing p2pfast into $(VENV): dependencies and the native build, about 3 minutes the first time"
	$(PIP) install --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/lint.stamp: $(VENV)/installed.stamp pyproject.toml
	$(PIP) install --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info p2pfast/_C.*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
