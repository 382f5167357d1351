# `make demo` and `make test` do all the set-up themselves. Everything runs in .venv, from requirements.lock.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(or $(shell command -v uv 2>/dev/null),$(VENV)-uv/bin/uv)
RUN := $(BIN)/llmtrain
LOCK := compile -q --universal --no-emit-index-url --no-annotate --no-header --python-version 3.11 --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: image k8s-up k8s-image k8s-train k8s-mlflow k8s-logs k8s-down k8s-demo k8s-manifests push ssh-init ssh-train ssh-train-bg ssh-eval ssh-eval-baseline train eval eval-baseline compare publish publish-hf convert help setup venv install extras develop demo demo-finetune test test-slow test-avx2 test-oldest nightly soak check lint format types imports configs bench bench-gpu gpu-wheels docs lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: develop ## the environment, complete

venv: $(BIN)/python ## an empty environment

$(BIN)/python: | $(UV)
	@$(PYTHON) -c 'import sys; sys.exit("llmtrain needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(UV) venv -q --python $$(command -v $(PYTHON)) $(VENV)

$(VENV)-uv/bin/uv:
	$(PYTHON) -m venv $(VENV)-uv && $(VENV)-uv/bin/pip install -q uv

install: $(VENV)/.installed ## the exact versions of requirements.lock, and llmtrain itself

extras: install ## EXTRAS=mlflow,onnx: optional packages (bnb, eval, fp8, mlflow, onnx, png, quality, ray, s3, wandb)
	$(if $(EXTRAS),,$(error name them: make extras EXTRAS=mlflow))
	$(UV) pip install -q --python $(BIN)/python -e '.[$(EXTRAS)]'

develop: $(VENV)/.developed ## what the tests and all extras need as well (requirements-dev.lock)

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python $(UV)
	$(UV) pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@

$(VENV)/.developed: requirements-dev.lock $(VENV)/.installed
	$(UV) pip install -q --compile-bytecode --python $(BIN)/python --require-hashes -r requirements-dev.lock
	@touch $@

demo: export LLMTRAIN_DEMO_BEGAN := $(shell date +%s)
demo: install ## prepare, train, evaluate and generate: 8 minutes on two cores
	@$(BIN)/python -m llmtrain.demos.quickstart

demo-finetune: install ## fine-tune the demo's model, compare it with what it was, publish it: 4 minutes
	@$(BIN)/python -m llmtrain.demos.finetune

# What llmtrain itself does, for those who like make. All of these are optional: CONFIG, MODEL (else the newest run), and
# ARGS for whatever else the command takes. TRAIN_CONFIG and EVAL_CONFIG are older names of CONFIG.
EVAL_WORDS = eval $(MODEL) $(addprefix --config ,$(or $(CONFIG),$(EVAL_CONFIG),$(if $(wildcard data/eval/*.jsonl),eval)))
EVAL = $(RUN) $(EVAL_WORDS)
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

# On another machine (docs/ssh.md). Set these here, in the environment or in `remote` of CONFIG. Variables for it, such as
# HF_TOKEN, come from ENV_FILE, else .env.
# REMOTE_USER := your_username
# REMOTE_HOST := 192.168.1.100
# REMOTE_DIR := ~/project
export REMOTE_USER REMOTE_HOST REMOTE_DIR
SSH = $(RUN) launch ssh
SSH_ENV = $(addprefix --env-file ,$(or $(ENV_FILE),$(wildcard .env)))

push: install ## this folder to REMOTE_HOST, into REMOTE_DIR
	$(SSH) push $(or $(CONFIG),$(TRAIN_CONFIG)) $(SSH_ENV) $(ARGS)

ssh-init: install ## the environment there
	$(SSH) init $(or $(CONFIG),$(TRAIN_CONFIG)) $(SSH_ENV) $(ARGS)

ssh-train: install ## CONFIG there, else quickstart; shows the log to the end
	$(SSH) train $(or $(CONFIG),$(TRAIN_CONFIG),quickstart) $(SSH_ENV) $(ARGS)

ssh-train-bg: install ## the same, and returns when it has started
	$(SSH) train $(or $(CONFIG),$(TRAIN_CONFIG),quickstart) --detach $(SSH_ENV) $(ARGS)

ssh-eval: install ## MODEL there, as `make eval` does here
	$(SSH) $(EVAL_WORDS) $(SSH_ENV) $(ARGS)

ssh-eval-baseline: install ## there, the model that MODEL was tuned from
	$(SSH) $(EVAL_WORDS) evaluation.subject=base $(SSH_ENV) $(ARGS)

# The image, and a cluster of kind on this machine: two pods that train together, and MLflow beside them.
IMAGE ?= llmtrain:local
VARIANT ?= cuda
CONTAINERS ?= $(if $(shell command -v docker 2>/dev/null),docker,podman)
KIND := llmtrain
NAME = $(notdir $(basename $(or $(CONFIG),quickstart)))
KUBECTL := kubectl --context kind-$(KIND)

image: ## the image IMAGE, by docker or podman; VARIANT=cpu has no CUDA, EXTRAS names extras
	$(CONTAINERS) build $(if $(filter podman,$(CONTAINERS)),--format docker) -f deploy/Dockerfile -t $(IMAGE) \
		--build-arg VARIANT=$(VARIANT) $(if $(EXTRAS),--build-arg EXTRAS=$(EXTRAS)) \
		--build-arg VERSION=$$(sed -n 's/.*"\(.*\)".*/\1/p' src/llmtrain/_version.py) \
		--build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) .

k8s-up: ## a cluster of kind, to which kubectl leads afterwards
	kind get clusters | grep -qx $(KIND) || kind create cluster --name $(KIND)
	kubectl config use-context kind-$(KIND)

k8s-image: ## the CPU image, on the nodes of that cluster
	$(MAKE) image VARIANT=cpu
	kind load docker-image $(IMAGE) --name $(KIND)

k8s-train: install ## CONFIG, else quickstart, in two pods of that cluster
	kubectl config use-context kind-$(KIND)
	$(RUN) launch k8s $(or $(CONFIG),quickstart) $$(cat deploy/kubernetes/overlays/kind/words) --image $(IMAGE) --name $(NAME) $(ARGS)

k8s-mlflow: ## MLflow on that cluster, shown at http://127.0.0.1:5000
	$(KUBECTL) apply --server-side -f deploy/kubernetes/mlflow.yaml
	$(KUBECTL) rollout status deployment/mlflow
	$(KUBECTL) port-forward service/mlflow 5000

k8s-logs: install ## the log of the run on that cluster, until it ends
	kubectl config use-context kind-$(KIND)
	$(RUN) launch k8s status $(NAME) --follow

k8s-down: ## remove the cluster, with its volumes
	kind delete cluster --name $(KIND)

k8s-demo: k8s-up k8s-image ## all of it: cluster, image, MLflow, and a short run
	$(KUBECTL) apply --server-side -f deploy/kubernetes/mlflow.yaml
	$(MAKE) k8s-train ARGS='trainer.max_steps=20 --follow'

k8s-manifests: install ## write deploy/kubernetes anew
	$(BIN)/python -m deploy.kubernetes.generate

# Tests run in as many processes at a time; most compute on one thread.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile
# The instructions of a processor that has neither AVX-512 nor bfloat16, as most laptops have them.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

test: develop ## the tests, without the slow ones
	$(PYTEST) -m "not slow and not nightly" --durations 20

# A test that starts processes waits for them for a limited time, so one of these runs at a time, and one other beside it.
test-slow: develop test-avx2 ## the slow tests
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadgroup -m "slow and not nightly and not alone" --durations 40
	$(BIN)/python -m pytest -m "slow and not nightly and alone"

test-avx2: develop ## a few tests as an AVX2-only processor computes them
	$(AVX2) $(PYTEST) -m "not slow and not nightly" tests/golden tests/unit/training tests/unit/distributed/test_native_bf16.py \
		tests/unit/models/test_decoder_forward.py tests/unit/models/test_decoder_loss.py tests/unit/models/test_decoder_compile.py

# Everything that pyproject.toml asks for in its oldest version that is allowed: torch 2.10, transformers 5.17.
OLDEST := $(VENV)-oldest

test-oldest: $(OLDEST)/.installed ## training and models with the oldest versions that are allowed
	$(OLDEST)/bin/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile -m "not slow and not nightly" \
		tests/golden tests/unit/models tests/unit/training tests/unit/distributed tests/unit/generation

$(OLDEST)/.installed: pyproject.toml | $(BIN)/python $(UV)
	$(UV) venv -q --clear --python $(BIN)/python $(OLDEST)
	$(UV) pip install -q --python $(OLDEST)/bin/python --resolution lowest-direct -r pyproject.toml --extra bnb
	$(UV) pip install -q --python $(OLDEST)/bin/python --no-deps -e .
	$(UV) pip install -q --python $(OLDEST)/bin/python pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

nightly: develop test-oldest ## what takes hours
	$(BIN)/python -m pytest -m nightly

soak: develop ## a thousand kills while runs save: hours
	$(BIN)/python -m tests.support.save_kills 1000

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
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.tuning
	$(BIN)/python -m benchmarks.saving
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.prepare
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.inspecting
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.storage
	$(BIN)/python -m benchmarks.generating
	$(BIN)/python -m benchmarks.tracking

bench-gpu: develop ## on a GPU: is it right, and how fast, in ten minutes; artifacts/gpu.json
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-wheels: develop ## what a GPU machine without network may lack, for bench-gpu; artifacts/wheels
	$(BIN)/python -m benchmarks.gpu --collect $(ARGS)

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
	rm -rf $(VENV) $(VENV)-uv $(OLDEST) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
