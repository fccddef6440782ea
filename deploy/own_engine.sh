#!/usr/bin/env bash
# Runs a command with a temporary Docker engine, which is removed at the end, on a Debian machine as root.
#
#     deploy/own_engine.sh deploy/verify.sh
#
# For machines without a Docker engine and without an image registry: debootstrap builds the images that compose.yaml and
# the Dockerfile name from Debian's packages. The engine runs in a separate network namespace, so the machine's bridges and
# firewall rules do not change; ports that compose publishes on 127.0.0.1 are published in that namespace, where COMMAND
# runs too.
#
# Debian has no package of Grafana: unless WITHOUT is set, COMMAND runs with WITHOUT=grafana.
#
# Needs: apt-get install docker.io docker-compose debootstrap iproute2 iptables
# WHEELS: folder of wheels that the build uses instead of a package index (optional; required without a network).
# KEEP_LOG: file for the log of the engine.
# BASES: folder that keeps the file systems for the next run (default: they are built again).
set -euo pipefail
cd "$(dirname "$0")/.."
{ # bash reads the whole block before it runs it, so the file may be edited meanwhile

[ "$(id -u)" = 0 ] || { echo "expected to run as root, for debootstrap and dockerd" >&2; exit 2; }
for tool in dockerd debootstrap ip nsenter iptables; do
  command -v "$tool" >/dev/null || { echo "expected $tool to be installed" >&2; exit 2; }
done

WORK=$(mktemp -d)
BASES=${BASES:-$WORK/bases}
SUITE=bookworm
NETWORK=lensrack-$$
ENGINE='' INDEX='' COMMAND=''

ended() { # ended PID : end a process that this script started, and wait for it
  [ -n "$1" ] || return 0
  kill "$1" 2>/dev/null || true
  while kill -0 "$1" 2>/dev/null; do wait "$1" 2>/dev/null || true; done
}

finish() {
  local status=$?
  set +e
  trap - EXIT INT TERM
  ended "$COMMAND"
  ended "$INDEX"
  ended "$ENGINE"  # ends all its containers; must be gone before its folders are removed
  ip netns delete "$NETWORK" 2>/dev/null || true
  grep " $WORK/" /proc/mounts | cut -d' ' -f2 | sort -r | xargs -r umount -l
  [ -z "${KEEP_LOG:-}" ] || cp "$WORK/dockerd.log" "$KEEP_LOG"
  rm -rf --one-file-system "$WORK"
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

# --- file systems out of Debian's packages ---------------------------------------------------------------------------

base() { # base NAME PACKAGE… : a minimal Debian with these packages, below $BASES/NAME
  local name=$1; shift
  [ -e "$BASES/$name.whole" ] && return
  echo "making the $name file system from Debian's packages"
  rm -rf "${BASES:?}/$name"
  if [ "$name" = debian ]; then
    debootstrap --variant=minbase --include=ca-certificates "$SUITE" "$BASES/debian" >"$WORK/debootstrap.log"
  else
    cp -a "$BASES/debian" "$BASES/$name"
    printf '#!/bin/sh\nexit 101\n' >"$BASES/$name/usr/sbin/policy-rc.d"  # packages must not start services here
    chmod +x "$BASES/$name/usr/sbin/policy-rc.d"
    cp /etc/resolv.conf "$BASES/$name/etc/resolv.conf"
    chroot "$BASES/$name" /usr/bin/env DEBIAN_FRONTEND=noninteractive sh -c \
      "apt-get update -qq && apt-get install -qq --no-install-recommends $*" >"$WORK/$name.log" 2>&1
  fi
  rm -rf "$BASES/$name"/var/cache/apt/archives/*.deb "$BASES/$name"/var/lib/apt/lists/*
  touch "$BASES/$name.whole"
}

named() { sed -nE "s/^ *(image:|FROM) *([^ ]*$1:[^ ]+).*/\2/p" deploy/compose.yaml Dockerfile | head -1; }

tag() { # tag BASE IMAGE CHANGE… : the file system as an image of that name
  local base=$1 image=$2 changes=(); shift 2
  for change in "$@"; do changes+=(--change "$change"); done
  echo "$image is made of Debian's packages: $base"
  tar -C "$BASES/$base" -c . | docker import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
    "${changes[@]}" - "$image" >/dev/null
}

mkdir -p "$BASES"
base debian
base python python3.11 python3.11-venv
base services redis-server haproxy prometheus
ln -sf /usr/bin/python3.11 "$BASES/python/usr/local/bin/python"
ln -sf /usr/bin/python3.11 "$BASES/python/usr/local/bin/python3"
ln -sf /usr/sbin/haproxy "$BASES/services/usr/local/bin/haproxy"
mkdir -p "$BASES/services/data" "$BASES/services/prometheus"
chown 999:999 "$BASES/services/data"           # as in the official images
chown 65534:65534 "$BASES/services/prometheus"

# --- the engine ------------------------------------------------------------------------------------------------------

ip netns add "$NETWORK"
ip -n "$NETWORK" link set lo up
inside=(nsenter --net="/run/netns/$NETWORK")  # nsenter becomes the program, so its pid is the program's
"${inside[@]}" sysctl -qw net.ipv4.ip_forward=1 || true
echo "{}" >"$WORK/daemon.json"
export DOCKER_HOST="unix://$WORK/docker.sock"
"${inside[@]}" dockerd --data-root "$WORK/data" --exec-root "$WORK/exec" --pidfile "$WORK/dockerd.pid" --host "$DOCKER_HOST" \
  --config-file "$WORK/daemon.json" --userland-proxy=true >"$WORK/dockerd.log" 2>&1 &
ENGINE=$!
for _ in $(seq 120); do
  docker info >/dev/null 2>&1 && break
  kill -0 "$ENGINE" 2>/dev/null || { tail -20 "$WORK/dockerd.log" >&2; exit 1; }
  sleep 0.5
done
docker info --format 'engine {{.ServerVersion}}, storage {{.Driver}}'

tag python "$(named python)"
tag services "$(named redis)" 'WORKDIR /data'
tag services "$(named haproxy)" 'USER 99'
tag services "$(named prometheus)" 'USER 65534' 'ENTRYPOINT ["/usr/bin/prometheus"]'

if [ -n "${WHEELS:-}" ]; then  # the build runs in the engine's network, which has no other index
  "${inside[@]}" python3 -m http.server 8099 --bind 127.0.0.1 --directory "$WHEELS" >/dev/null 2>&1 &
  INDEX=$!
  export BUILD_ARGS="--network=host --build-arg PIP_FIND_LINKS=http://127.0.0.1:8099/ --build-arg PIP_NO_INDEX=1 ${BUILD_ARGS:-}"
fi
export WITHOUT=${WITHOUT-grafana}
"${inside[@]}" "$@" &  # in the background, so that the shell handles signals while it runs
COMMAND=$!
wait "$COMMAND"
exit
}
