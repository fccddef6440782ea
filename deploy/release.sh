#!/usr/bin/env bash
# `make release`: builds the wheel and the source archive of this version into dist/, and prints the image commands.
#
# The version is defined in pyproject.toml; this script compares all copies of it. Images take long to build, so they are
# built only with IMAGES=1 and a Docker engine; otherwise their commands are printed. Nothing is pushed anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
dist=${DIST:-dist}

version=$("$python" -m hatchling version)
fail() { echo "release: $1" >&2; exit 1; }
grep -q -m1 "^## $version" <(grep -m1 '^## [0-9]' CHANGELOG.md) || fail "expected CHANGELOG.md to begin with ## $version"
grep -q "^ARG VERSION=$version\$" Dockerfile || fail "expected ARG VERSION=$version in Dockerfile"
for name in version appVersion; do
  grep -q "^$name: \"\?$version\"\?\$" deploy/helm/lensrack/Chart.yaml || fail "expected $name: $version in the chart"
done

rm -rf "${dist:?}"/lensrack-*
"$python" -m hatchling build -t sdist -t wheel -d "$dist" >/dev/null
(cd "$dist" && sha256sum lensrack-"$version"*)

revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
for variant in cpu cuda; do
  build=(docker build -t "lensrack:$version-$variant" --build-arg "VARIANT=$variant" --build-arg "VERSION=$version"
         --build-arg "REVISION=$revision" .)
  echo "${build[*]}"
  if [ "${IMAGES:-}" = 1 ]; then
    docker info >/dev/null 2>&1 || fail "IMAGES=1: expected a Docker engine, found none"
    "${build[@]}"
  fi
done
