# `make serve` and `make test` are all that users need. The other targets are for developers.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVED := $(VENV)/.served
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: docs reference sync-client release serve test test-long fuzz guards soak chaos swaps redis chromium prometheus screenshots check format clean help verify-deploy proto gpu-check

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(SERVED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server]'
	@touch $@

$(STAMP): $(SERVED)  # for developers and tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,dev]'
	@touch $@

$(EXTRAS): $(STAMP)  # tracing, the chart's renderer, other clients; tests of extras that cannot be installed are skipped
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[otel,deploy]' || echo "without the extras"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[grpc,clients]' || echo "without gRPC and the clients of other servers"
	@touch $@

serve: $(SERVED)  ## install what is missing and serve on 127.0.0.1:8000
	$(BIN)/python -m server serve

TESTERS ?= 2
test: $(EXTRAS) redis chromium prometheus  ## all tests, in TESTERS processes; the tests of one file run in one process, slow files first
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile --no-loadscope-reorder

test-long: $(EXTRAS) redis  ## the tests that take long, and the benchmarks that start servers
	$(BIN)/python -m pytest -m long

FUZZ ?= 100
FUZZ_S ?= 300
fuzz: $(EXTRAS)  ## FUZZ times as many generated inputs as `test`; then FUZZ_S seconds of libFuzzer for each reader
	LENSRACK_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz --timeout 0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]' || echo "without atheris"
	! $(BIN)/python -c 'import atheris' 2>/dev/null || for reader in $$($(BIN)/python -m tests.fuzz.readers); do \
	  $(BIN)/python -m tests.fuzz.atheris_readers $$reader $(FUZZ_S) || exit 1; done

guards: $(EXTRAS) redis  ## apply each mutation of tests/guards to the code, and check that its test fails
	$(BIN)/python -m tests.guards

SOAK ?=
soak: $(EXTRAS)  ## check memory growth over many predictions, loads and jobs; SOAK="--predictions 5000 …" for fewer
	$(BIN)/python -m tests.soak $(SOAK)

CHAOS ?= --minutes 5
chaos: $(EXTRAS) redis  ## kill, stop and cut off a server under checking clients, with files and with Redis; CHAOS="--seed 2 …"
	$(BIN)/python -m tests.chaos $(CHAOS)
	$(BIN)/python -m tests.chaos $(CHAOS) --redis

swaps: $(EXTRAS)  ## check memory growth over 100,000 evictions, with 10,000 tasks and 1,000 slots
	LENSRACK_BACKBONE=untrained $(BIN)/python -m server bench rack --swaps 100000

GPU ?=
gpu-check:       ## compare a GPU's answers and gradients with the CPU's, and time it; GPU="--batches 64 …"; needs torch and timm only
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m server.bench.device $(GPU)

redis:           ## install the redis-server that the tests start and stop, if it is missing
	@command -v redis-server >/dev/null || { \
	  echo "installing redis-server"; export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends redis-server >/dev/null; }

chromium:        ## install the browser for the dashboard tests, if it is missing
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  echo "installing chromium"; export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; }

prometheus:      ## install prometheus for the tests of alerts and dashboards, if it is missing; without it they are skipped
	@command -v promtool >/dev/null || { \
	  echo "installing prometheus"; export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends prometheus >/dev/null; }

screenshots: $(STAMP) chromium  ## take the screenshots under docs/screenshots again; BACKBONE= and WEIGHTS= for a trained backbone
	$(BIN)/python -m tests.e2e.screenshots docs/screenshots $(BACKBONE) $(WEIGHTS)

check: $(STAMP)  ## run the linters, exactly as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

proto: $(STAMP)  ## compile open_inference.proto again after a change (needs grpcio-tools)
	cd server/api/oip/grpc && $(abspath $(BIN))/python -m grpc_tools.protoc -I. --descriptor_set_out=open_inference.pb open_inference.proto

verify-deploy: $(STAMP)  ## start the compose deployment, kill each part of it, check, and remove it (needs a Docker engine)
	deploy/verify.sh

reference: $(STAMP)  ## generate docs/reference and the diagrams of the docs from the code
	$(BIN)/python -m docs.generator

sync-client: $(STAMP)  ## generate client/lensrack/client.py from async_client.py
	$(BIN)/python client/generate_sync.py

docs: $(STAMP)   ## build the documentation site in build/site and check every link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release: $(STAMP) ## build wheel and source archive into dist/ and print the image commands; IMAGES=1 runs these too
	PYTHON=$(BIN)/python deploy/release.sh

format: $(STAMP) ## fix what the linters can fix automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the environment and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
