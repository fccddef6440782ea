# Two commands do it all: `make serve` and `make test`. The rest is for the people who work on the house.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVED := $(VENV)/.served
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: docs reference sync-client release serve test test-long fuzz guards soak swaps redis chromium prometheus screenshots check format clean help verify-deploy proto gpu-check

help:            ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(SERVED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server]'
	@touch $@

$(STAMP): $(SERVED)  # for the people who work on the house, and for tests
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[server,dev]'
	@touch $@

$(EXTRAS): $(STAMP)  # tracing, the chart's renderer, foreign clients: where they cannot be installed, their tests skip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[otel,deploy]' || echo "without the extras"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[grpc,clients]' || echo "without gRPC and foreign clients"
	@touch $@

serve: $(SERVED)  ## install what is missing and serve on 127.0.0.1:8000
	$(BIN)/python -m server serve

TESTERS ?= 2
test: $(EXTRAS) redis chromium prometheus  ## all tests, in TESTERS processes; a file's stay together
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

test-long: $(EXTRAS) redis  ## the proofs that take minutes each
	$(BIN)/python -m pytest -m long

FUZZ ?= 100
FUZZ_S ?= 300
fuzz: $(EXTRAS)  ## FUZZ times as many strange inputs as `test` tries; then FUZZ_S seconds of libFuzzer for each reader
	LENSRACK_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz --timeout 0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]' || echo "without atheris"
	! $(BIN)/python -c 'import atheris' 2>/dev/null || for reader in $$($(BIN)/python -m tests.fuzz.readers); do \
	  $(BIN)/python -m tests.fuzz.atheris_readers $$reader $(FUZZ_S) || exit 1; done

guards: $(EXTRAS) redis  ## break the code in each of the ways of tests/guards, and see its test fail
	$(BIN)/python -m tests.guards

SOAK ?=
soak: $(EXTRAS)  ## many predictions, load cycles and jobs: does a server grow? SOAK="--predictions 5000 …" for less
	$(BIN)/python -m tests.soak $(SOAK)

swaps: $(EXTRAS)  ## 10,000 tasks and 1,000 places: 100,000 lenses make room for others; does memory grow?
	LENSRACK_BACKBONE=untrained $(BIN)/python -m server bench rack --swaps 100000

GPU ?=
gpu-check:       ## does a GPU give the CPU's answers and gradients, and how fast? GPU="--batches 64 …"; needs torch and timm only
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m server.bench.device $(GPU)

redis:           ## the redis-server that the tests start and stop, where it is missing
	@command -v redis-server >/dev/null || { \
	  echo "installing redis-server"; export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends redis-server >/dev/null; }

chromium:        ## the browser that the tests drive through the dashboard, where it is missing
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  echo "installing chromium"; export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; }

prometheus:      ## what the tests ask alerts and dashboards with, where it is missing; without it they skip
	@command -v promtool >/dev/null || { \
	  echo "installing prometheus"; export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends prometheus >/dev/null; }

screenshots: $(STAMP) chromium  ## the dashboard's pictures under docs/screenshots, taken anew; BACKBONE= WEIGHTS= of a trained one
	$(BIN)/python -m tests.e2e.screenshots docs/screenshots $(BACKBONE) $(WEIGHTS)

check: $(STAMP)  ## the linters, exactly as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

proto: $(STAMP)  ## the gRPC description, compiled again after a change of open_inference.proto (needs grpcio-tools)
	cd server/api/oip/grpc && $(abspath $(BIN))/python -m grpc_tools.protoc -I. --descriptor_set_out=open_inference.pb open_inference.proto

verify-deploy: $(STAMP)  ## the production shape in containers: up, broken in every part, down (needs a Docker engine)
	deploy/verify.sh

reference: $(STAMP)  ## docs/reference and the pictures of the docs, made anew from the code
	$(BIN)/python -m docs.generator

sync-client: $(STAMP)  ## client/lensrack/client.py, generated again after a change of async_client.py
	$(BIN)/python client/generate_sync.py

docs: $(STAMP)   ## the site in build/site, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

release: $(STAMP) ## wheel and source archive into dist/, and the images' tags; IMAGES=1 builds these too
	PYTHON=$(BIN)/python deploy/release.sh

format: $(STAMP) ## what the linters can mend by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:           ## remove the environment and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
