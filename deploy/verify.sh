#!/usr/bin/env bash
# Starts the compose deployment, kills every part of it, checks that nothing is lost, and removes it.
#
#     deploy/verify.sh                              beside a running Docker engine
#     deploy/own_engine.sh deploy/verify.sh         without a Docker engine, as root on Debian
#
# WITHOUT: services to leave out, if their image is not available. BUILD_ARGS: more arguments of `docker build`.
# BUILD_LOG: file for the output of the build. SOON_S: the longest wait for any step (600; more on a busy machine).
# It uses a separate project, volumes and ports, and never touches those of a real deployment.
set -euo pipefail
cd "$(dirname "$0")/.."

docker info >/dev/null 2>&1 || { echo "expected a Docker engine that answers, found none" >&2; exit 3; }
compose=(docker-compose)
if docker compose version >/dev/null 2>&1; then compose=(docker compose); fi
command -v "${compose[0]}" >/dev/null || { echo "expected Docker Compose to be installed" >&2; exit 3; }
python=${PYTHON:-.venv/bin/python}

export COMPOSE_PROJECT_NAME=lensrack-verify COMPOSE_FILE=deploy/compose.yaml IMAGE_NAME=lensrack-verify
export PUBLISH_ADDRESS=127.0.0.1 PUBLISH_PORT=${PUBLISH_PORT:-18000}
export PROMETHEUS_PORT=${PROMETHEUS_PORT:-19090} GRAFANA_PORT=${GRAFANA_PORT:-13000}
# A short lease keeps the verification short; one thread per process suits small machines.
export LENSRACK_LEASE_S=6 LENSRACK_THREADS=1 LENSRACK_WORKER_THREADS=1 LENSRACK_MAX_ATTEMPTS=5
export LENSRACK_ALLOWED_HOSTS=lens.example
unset LENSRACK_BACKBONE LENSRACK_BACKBONE_WEIGHTS LENSRACK_SAMPLE_TASKS LENSRACK_DTYPE LENSRACK_API_KEY LENSRACK_URL

STORY=''

down() { "${compose[@]}" down --volumes --remove-orphans --timeout 50 >/dev/null 2>&1 || true; }
finish() {
  local status=$?
  trap - EXIT INT TERM
  if [ -n "$STORY" ]; then kill "$STORY" 2>/dev/null || true; wait "$STORY" || true; fi
  if [ "$status" != 0 ]; then
    echo "--- the last log lines of each container" >&2
    for id in $(docker ps -aq --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME"); do
      docker inspect -f '== {{.Name}} {{.State.Status}} ({{.State.ExitCode}})' "$id" >&2
      docker logs --tail 25 "$id" >&2 2>&1 || true
    done
  fi
  down
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

down  # remove what a killed verification left behind
echo "building the image (VARIANT=cpu)"
# shellcheck disable=SC2086  # several arguments
docker build ${BUILD_ARGS:-} --build-arg VARIANT=cpu --tag "$IMAGE_NAME:cpu" . >"${BUILD_LOG:-/dev/null}" 2>&1 \
  || { echo "the image cannot be built: set BUILD_LOG=FILE to see why" >&2; exit 1; }
"$python" deploy/verify.py "${compose[@]}" &  # in the background, so that the shell handles signals while it runs
STORY=$!
wait "$STORY"
STORY=''
