# The two commands that matter are `make demo` and `make test`; `make help` lists the others.
BIN := .venv/bin
export PYTHONDONTWRITEBYTECODE ?= 1

.PHONY: help setup image demo test test-unit test-slow test-hardened test-llm kernel soak firecracker-lab coverage lint fmt bench agentdojo conformance lock clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

setup: ## install what is missing: system packages, .venv
	@tools/setup

image: setup ## build the guest image (about 20 s the first time)
	@$(BIN)/luminaguard image build

demo: image ## run the main job on a copy of examples/bookkeeping
	@$(BIN)/python examples/demo.py $(if $(YES),--yes)

test: setup ## all tests, with real micro-VMs
	@tools/test

test-unit: setup ## the tests that need no machine, in seconds
	@$(BIN)/pytest -q -m "not vm" -n 2

test-slow: setup ## tests that take long: large files, set-up interrupted, every import, a fleet under faults (about 10 minutes)
	@tools/test-image && $(BIN)/pytest -q -m slow -n 2 --dist loadgroup

test-hardened: setup ## all tests again, on a kernel that is built here (about 25 minutes)
	@tools/test-hardened

test-llm: setup ## the agent loop with a real model server and a model of random weights (builds it: 10 minutes)
	@tools/test-llm

kernel: setup ## build the guest image with a small hardened kernel of its own (10 minutes)
	@tools/setup-kernel && $(BIN)/luminaguard image build --kernel hardened

soak: setup ## clone hygiene over 200 clones, and the pool, at length (about 10 minutes)
	@LUMINAGUARD_TEST_CLONES=200 $(BIN)/pytest -q tests/vm/test_pool.py --timeout 900

firecracker-lab: setup ## the tests with a real Firecracker, in an emulated machine where KVM is missing
	@tools/test-image && $(BIN)/python tools/firecracker_lab.py $(ARGS)

conformance: setup ## the conformance suite of MCP: our client, and a server behind the gateway (needs npm; two minutes)
	@tools/conformance

coverage: setup ## the tests with branch coverage, subprocesses included
	@$(BIN)/pytest -q -n 2 --cov --cov-report=term:skip-covered

lint: setup ## ruff, mypy --strict, the import contract
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

fmt: setup ## format the code
	@$(BIN)/ruff check --fix-only -q . ; $(BIN)/ruff format .

bench: image ## measure; prints JSON with facts about this host
	@$(BIN)/python bench/run.py

agentdojo: setup ## judge AgentDojo's traces with our rules; prints utility and security
	@tools/agentdojo

lock: ## resolve the Python dependencies anew (needs uv)
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate pyproject.toml --group dev -o requirements/dev.lock
	@uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate pyproject.toml -c requirements/dev.lock -o requirements/runtime.lock
	@echo agentdojo==0.1.35 | uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate - -o requirements/agentdojo.lock
	@echo gguf==0.19.0 | uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate - -o requirements/llm.lock

clean: ## remove .venv and caches
	@rm -rf .venv .venv-agentdojo .venv-llm .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
