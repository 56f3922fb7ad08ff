# Two commands do all the set-up: `make demo` and `make test`. Both need Python >= 3.10, a C++ compiler and make.
PYTHON ?= python3
VENV ?= .venv
# The versions that were tested; leave empty to take what pip finds: make test CONSTRAINTS=
CONSTRAINTS ?= -c constraints-cpu.txt

# What `make bench` compares with, as ratios: a committed run. On another kind of processor: make bench BASELINE=
BASELINE ?= benchmarks/results/cpu-avx512-2026-11-26.json

BIN := $(VENV)/bin

.PHONY: demo test test-all sanitize fuzz endurance bench docs style clean

demo: $(VENV)/.demo
	$(BIN)/berdiff-fast demo --output demo.png

# A file of tests stays in one process, and each process in one thread: two cores are used well by two of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# All but the tests marked `slow`, which test-all runs too: the longest tables of equal bits, emulations, long trainings.
test: $(VENV)/.test
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)
	@echo "left out, but for make test-all: $$($(BIN)/pytest -q --collect-only -m slow 2>/dev/null | tail -1)"

test-all: $(VENV)/.test
	$(PYTEST) $(PYTEST_ARGS)

# The CPU module under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; wants Linux and GCC.
sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitizers/run.py

# Every reader, fed with damaged files, for so many seconds.
SECONDS ?= 60
SEED ?= 0
fuzz: $(VENV)/.test
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzzing --seconds $(SECONDS) --seed $(SEED)

# Runs killed at random moments, and every write that fails once (a quarter of an hour).
KILLS ?= 50
endurance: $(VENV)/.test
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m endurance kills --count $(KILLS) --seed $(SEED)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m endurance writes

bench: $(VENV)/.test
	mkdir -p benchmarks/results
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json benchmarks/results/last.json $(if $(BASELINE),--baseline $(BASELINE))

docs: $(VENV)/.test
	$(BIN)/mkdocs build --strict

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# In place, so that Python started here finds the compiled modules beside the sources.
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[figures]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
