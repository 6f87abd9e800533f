# Needs Python >= 3.11 and make; everything else comes into .venv. `make demo` and `make test` are all a newcomer types.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
ARGS ?=
# Two files at a time, on the two cores that this is measured on; each file's tests share what they set up. In their order:
# Ray Data fails in a process whose Ray session ended, which the tests of training do, and those of pipeline come before.
PYTEST := $(BIN)/python -m pytest -q --durations=20 -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint check slow soak bench lock clean

demo: $(READY)
	$(BIN)/darkroom run shapes $(ARGS)

test: lint
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

slow: $(READY)
	$(PYTEST) -m "slow and not gpu and not services"

# The tests that repeat something at random, with all of their rounds (kills of workers, drivers, whole trees, and
# around saving), and growth up to a million samples.
soak: $(READY)
	DARKROOM_SOAK=1 $(BIN)/python -m pytest -q -m soak --durations=0 --timeout=0
	DARKROOM_SOAK=1 $(BIN)/python -m tests.benchmarks.growth

# That the benchmarks measure what they say, and then what a training takes beside its network: each figure with its target,
# met or missed, which decides nothing. The other benchmarks say in their first line how they are run.
bench: $(READY)
	$(BIN)/python -m pytest -q -s -m "not gpu" tests/benchmarks
	$(BIN)/python -m tests.benchmarks.step
	$(BIN)/python -m tests.benchmarks.checkpoints
	$(BIN)/python -m tests.benchmarks.planned

# The lock covers every platform and Python >= 3.11, and names no index.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --group dev --extra pretrained --extra s3 --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header -q -o requirements.lock

$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; say which: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || { $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip -q; }
	test -x $(BIN)/uv || $(BIN)/python -m pip install -q --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install -q --compile-bytecode --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache
