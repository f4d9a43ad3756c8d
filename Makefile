# Three commands: make demo, make check, make test. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
# A few matrices of a few hundred rows: spinning threads cost more than they give.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: setup demo check test test-fast format bench-compare bench-svd bench-checkpoint bench-merge interop clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/ready

demo: setup
	$(BIN)/python examples/mail/generate.py runs/mail
	$(BIN)/milora train examples/mail/run.yaml $$(test -e runs/mail/milora/config.yaml && echo --resume)
	$(BIN)/milora verify runs/mail/milora

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_structure.py

test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow"

test-fast: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One of those that benchmarks/comparison.py lists, or the rest of it; then the tables of the docs.
NAME ?= minilm-trec
bench-compare: setup
	$(BIN)/python benchmarks/comparison.py $(NAME)
	$(BIN)/python benchmarks/comparison.py docs

# Without PASSIVE waiting, which slows the small matrices of both sides differently.
bench-svd: setup
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/svd.py run
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/svd.py real
	$(BIN)/python benchmarks/svd.py plot

bench-checkpoint: setup
	env -u OMP_WAIT_POLICY $(BIN)/python benchmarks/checkpoint.py build/seven
	$(BIN)/python benchmarks/svd.py plot

# The two servers are built in build/, once; then half an hour on two cores.
interop: setup
	$(BIN)/python benchmarks/interop.py build
	$(BIN)/python benchmarks/interop.py run
	$(BIN)/python benchmarks/interop.py docs

# 27 GB of room for the time it takes.
bench-merge: setup
	$(BIN)/python benchmarks/merge.py run build/seven
	$(BIN)/python benchmarks/merge.py docs

clean:
	rm -rf .venv build dist runs
