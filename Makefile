# Every target does its own set-up: a clone and `make demo` is all that a new user needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTS := core $(wildcard plugins/*)
ARGS ?=

.PHONY: demo test lint bench stress fuzz rdma-lab docs clean setup
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(DISTS)) tools/setup
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh tools/setup $(DISTS)
	@touch $@

demo: setup  ## a running machine migrates between two processes, with its progress (ARGS="--uri unix:/tmp/m.sock")
	@$(BIN)/python -m whimbrel_testing.demo $(ARGS)

test: setup  ## the tests (ARGS="-k tcp" chooses); a missing peer is a skip, with its reason
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy core/src plugins/*/src

bench: setup  ## our speed beside QEMU's and beside a raw socket copy
	$(BIN)/python benchmarks/ram.py $(ARGS)

stress: setup  ## kill -9 of either side at 200 random moments, and a link cut in every phase
	WHIMBREL_KILLS=$${WHIMBREL_KILLS:-200} $(BIN)/python -m pytest tests/promise $(ARGS)

fuzz: setup  ## the parsers under a fuzzer, for FUZZ_SECONDS in all (ARGS="vmstate" chooses a target)
	$(BIN)/python fuzz/run.py --seconds $${FUZZ_SECONDS:-600} $(ARGS)

rdma-lab: setup  ## tests over real verbs, in an emulated machine with Soft-RoCE; results in build/rdma-lab (ARGS="-k qemu")
	@mkdir -p build/rdma-lab
	$(BIN)/python tests/rdma_lab/lab.py tests --out build/rdma-lab $(ARGS)

docs: setup  ## write the generated pages, and run the examples in the docs as tests
	$(BIN)/python tools/reference.py
	$(BIN)/python -m pytest tests/docs $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
