# `make demo` and `make test` do all the set-up themselves. Everything runs in .venv, from requirements.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(or $(shell command -v uv 2>/dev/null),$(VENV)-uv/bin/uv)
RUN := $(BIN)/llmtrain
LOCK := compile -q --universal --no-emit-index-url --no-annotate --no-header --python-version 3.11 --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: train eval eval-baseline compare publish publish-hf convert help setup venv install develop demo demo-finetune test test-slow nightly soak check lint format types imports configs bench docs lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: develop ## the environment, complete

venv: $(BIN)/python ## an empty environment

$(BIN)/python: | $(UV)
	@$(PYTHON) -c 'import sys; sys.exit("llmtrain needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(UV) venv -q --python $$(command -v $(PYTHON)) $(VENV)

$(VENV)-uv/bin/uv:
	$(PYTHON) -m venv $(VENV)-uv && $(VENV)-uv/bin/pip install -q uv

install: $(VENV)/.installed ## the exact versions of requirements.lock, and llmtrain itself

develop: $(VENV)/.developed ## what the tests and all extras need as well (requirements-dev.lock)

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python $(UV)
	$(UV) pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

$(VENV)/.developed: requirements-dev.lock $(VENV)/.installed
	$(UV) pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements-dev.lock
	@touch $@

demo: install ## prepare, train, evaluate and generate: 8 minutes on two cores
	@$(BIN)/python -m llmtrain.recipes.demos.quickstart

demo-finetune: install ## fine-tune the demo's model, compare it with what it was, publish it: 4 minutes
	@$(BIN)/python -m llmtrain.recipes.demos.finetune

# What llmtrain itself does, for those who like make. All of these are optional: CONFIG, MODEL (else the newest run), and
# ARGS for whatever else the command takes. TRAIN_CONFIG and EVAL_CONFIG are older names of CONFIG.
EVAL = $(RUN) eval $(MODEL) $(addprefix --config ,$(or $(CONFIG),$(EVAL_CONFIG),$(if $(wildcard data/eval/*.jsonl),eval)))
PUBLISH = $(RUN) publish $(MODEL) $(addprefix --license ,$(LICENSE))

train: install ## CONFIG, else quickstart
	$(RUN) train $(or $(CONFIG),$(TRAIN_CONFIG),quickstart) $(ARGS)

eval: install ## MODEL on its own data, on data/eval if there is one, or by CONFIG
	$(EVAL) $(ARGS)

eval-baseline: install ## the model that MODEL was tuned from, on the same
	$(EVAL) evaluation.subject=base $(ARGS)

compare: install ## MODEL and BASELINE, else what it was tuned from, row by row
	$(EVAL) --baseline $(or $(BASELINE),auto) $(ARGS)

publish: install ## MODEL to the folder TO, else artifacts/models/<run_id>; LICENSE
	$(PUBLISH) $(addprefix --to ,$(TO)) $(ARGS)

publish-hf: install ## MODEL to the Hub, as HF_REPO_ID; LICENSE
	$(PUBLISH) --to hub $(ARGS)

convert: install ## IN, else data/*.json, to rows in OUT, else data/rows.jsonl
	$(RUN) convert $(or $(IN),'data/*.json') $(or $(OUT),data/rows.jsonl) $(ARGS)

test: develop ## the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow and not nightly"

test-slow: develop ## the slow tests
	$(BIN)/python -m pytest -m "slow and not nightly" --durations 20

nightly: develop ## what takes hours
	$(BIN)/python -m pytest -m nightly

soak: develop ## a thousand kills while runs save: hours
	$(BIN)/python -m llmtrain.testing.save_kills 1000

check: lint types imports configs ## all that needs no test run

lint: develop
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: develop ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: develop
	$(BIN)/mypy

imports: develop
	$(BIN)/lint-imports

configs: install
	@for config in src/llmtrain/configs/*.yaml; do $(RUN) validate "$$config" || exit 1; done

bench: develop ## side by side with peers
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/tuning.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/inspecting.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/generating.py
	$(BIN)/python benchmarks/tracking.py

docs: develop ## the manual, in site/
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

lock: | $(UV) ## work out the lock files and requirements.txt anew
	$(UV) pip $(LOCK) --generate-hashes --group dev --all-extras pyproject.toml -o requirements-dev.lock
	$(UV) pip $(LOCK) --generate-hashes --constraint requirements-dev.lock pyproject.toml -o requirements.lock
	echo '# The plain way, pip install -r requirements.txt: llmtrain, and what it needs in the versions of requirements.lock.' \
		> requirements.txt
	echo '--editable .' >> requirements.txt
	sed -n 's/^\([a-z0-9._-]*==.*[^ \\]\) *\\$$/\1/p' requirements.lock >> requirements.txt

clean: ## remove what was made, but no run and no data
	rm -rf $(VENV) $(VENV)-uv site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
