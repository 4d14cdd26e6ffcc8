# From a fresh clone: `make demo` or `make test`. Needs Python >= 3.10, make and a C++ compiler, nothing else.
# Compiler flags live in setup.py, which also explains LIIF_FAST_BUILD and its companions.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
# Triton's kernels under its interpreter, which has to be chosen before Triton is imported: a run of its own.
INTERPRETED = TRITON_INTERPRET=1 $(PY) -m pytest tests/ops tests/triton/test_interpreted.py --backend triton-interpreted
# Proofs run in two processes, each file of tests in one of them: their fixtures compile for minutes.
TWO_AT_A_TIME = -n 2 --dist loadfile
# Tests of what runs inside the extension: the ones worth running under the sanitizers.
KERNEL_TESTS = tests/ops/test_decode.py tests/ops/test_gather.py tests/ops/test_metasr.py tests/ops/test_cpu.py tests/cuda/test_emulated.py
CXX_FILES = find csrc tests bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
# The public modules; liif_fast brings liif_fast.ops, whose submodules have the names of its functions.
API = liif_fast '!liif_fast\.ops\..*' liif_fast.models liif_fast.models.base liif_fast.models.checkpoints \
	liif_fast.models.pretrained liif_fast.images.files liif_fast.images.jobs liif_fast.images.picture liif_fast.images.upscaling liif_fast.data \
	liif_fast.evaluation liif_fast.training
# Not $(VENV)/bin/clang-format: an environment that reuses another one's packages has no script of its own for them.
CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'

.DEFAULT_GOAL := help
.PHONY: help demo test prove lint bench gpu gpu-packages build wheel hub sanitize docs clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: build ## fetch the published model if possible, upscale a photo by 4 and by 2.7, next to bicubic
	$(PY) -m liif_fast.cli.demo --fetch

test: build ## build, then run the tests (PYTEST_ARGS='-k name' for some of them)
	$(PY) -m pytest $(PYTEST_ARGS)
	$(INTERPRETED) $(PYTEST_ARGS) -n 0

prove: build $(VENV)/.clients ## the slow proofs: every architecture, more cases on slow backends, some under sanitizers
	$(PY) -m pytest -m prove $(TWO_AT_A_TIME) $(PYTEST_ARGS)
	$(INTERPRETED) -m prove $(TWO_AT_A_TIME) $(PYTEST_ARGS)
	$(MAKE) sanitize PYTEST_ARGS='$(TWO_AT_A_TIME) -k "(avx2 or emulated) and (flag or nan or layout or mistakes)"'

lint: $(VENV)/.lint ## ruff, clang-format and mypy; changes nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CXX_FILES) | tr '\n' '\0' | xargs -0 -r $(CLANG_FORMAT) --dry-run -Werror
	$(PY) -m mypy

bench: build ## time the ops against the original formulation, save, fill the documents: 15 minutes
	$(PY) -m bench.run --budget 830 && $(PY) -m bench.report

gpu: build ## test and time every backend on this machine's GPU, in 8 minutes; the report goes to build/gpu
	$(PY) -m tests.gpu --out build/gpu

gpu-packages: $(VENV)/.installed ## pytest and its plugins, for a GPU machine without a network: in build/gpu/packages
	$(PY) -m pip install --quiet --upgrade --target build/gpu/packages pytest pytest-timeout pytest-xdist pytest-reportlog

build: $(VENV)/.installed ## compile what changed into liif_fast/_C.abi3.so
	$(PY) setup.py -q build_ext --inplace

wheel: $(VENV)/.installed ## a wheel for every Python >= 3.10 and torch >= 2.11, in dist/
	$(PY) -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

hub: $(VENV)/.installed ## the ops as a kernel of the Kernel Hub, one folder for each variant, in dist/hub
	$(PY) scripts/hub.py dist/hub

sanitize: $(VENV)/.installed ## the kernels' tests under the address and undefined-behavior sanitizers (GCC)
	LIIF_FAST_SANITIZE=1 $(PY) setup.py -q build_ext --inplace
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LIIF_FAST_SANITIZE=1 LIIF_FAST_EXTENSION="$$PWD/build/sanitize/_C.abi3.so" \
	$(PY) -m pytest --capture=sys $(KERNEL_TESTS) $(PYTEST_ARGS)

docs: $(VENV)/.installed ## the API reference from docstrings, in build/api; a warning is an error
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[docs]'
	$(PY) -W error::UserWarning -m pdoc --docformat google --template-directory scripts/api --output-directory build/api $(API)

clean: ## remove what was built; the environment in .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f liif_fast/_C.abi3.so liif_fast/_build.json
	find liif_fast tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml setup.py .ci/environment.py
	$(PYTHON) .ci/environment.py $(VENV)
	@touch $@

# Installers and checkers of packages, for the tests of wheels and of the Kernel Hub.
$(VENV)/.clients: pyproject.toml | $(VENV)/.installed
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[clients]'
	@touch $@

# The linters' versions are pinned in pyproject.toml, under the extra `lint`.
$(VENV)/.lint: pyproject.toml | $(VENV)/.installed
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[lint]'
	@touch $@
