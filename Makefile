# Every target does its own set-up: a clone and `make demo` is all that a new user needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DISTS := core $(wildcard plugins/*)
ARGS ?=

.PHONY: demo test lint bench bench-scaling profile stress fuzz rdma-lab docs clean setup
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(DISTS)) tools/setup \
		$(wildcard plugins/accel/setup.py plugins/accel/src/*/*.[ch])
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

bench: setup  ## our speed beside QEMU's and the raw limit: a table, and a page with plots (ARGS="--only random --runs 3 --size 256M")
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-scaling: setup  ## how it goes with RAM, channels, blocks and dirty rate: curves
	$(BIN)/python benchmarks/bench.py --scaling $(ARGS)

profile: setup  ## where the time of a migration goes, thread by thread (ARGS="--multifd 2 --channel unix")
	$(BIN)/python benchmarks/profiling.py $(ARGS)

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
