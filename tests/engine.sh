#!/usr/bin/env bash
# Makes this machine ready for the tests with Docker: an Engine that answers, and a base image that
# needs no registry of images. As root on Debian or Ubuntu; elsewhere it uses the Engine that is there.
set -euo pipefail

base=mainrun-base:test

if ! docker info >/dev/null 2>&1; then
  if ! command -v dockerd >/dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq docker.io >/dev/null
  fi
  # Not as a service: there may be no init here.
  nohup dockerd >/tmp/dockerd.log 2>&1 &
  for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && break
    sleep 1
  done
  docker info >/dev/null || { tail -n 20 /tmp/dockerd.log >&2; exit 1; }
fi

if docker image inspect "$base" >/dev/null 2>&1; then exit 0; fi
command -v debootstrap >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install -y -qq debootstrap >/dev/null
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
# The mirror that this machine itself uses; Debian's own where it says none.
mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb  *\(\[[^]]*\] *\)\{0,1\}\([^ ]*\).*/\2/p' \
  /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null | head -n 1)
packages=ca-certificates,git,libstdc++6,python3,python3-venv
# shellcheck disable=SC2086 # an empty mirror is no argument
debootstrap --variant=minbase --include="$packages" trixie "$root" $mirror >/tmp/debootstrap.log \
  || { tail -n 20 /tmp/debootstrap.log >&2; exit 1; }
# Whom this machine trusts, the image trusts: a package index may stand behind a proxy of its own.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
[ ! -f /etc/pip.conf ] || cp -L /etc/pip.conf "$root/etc/pip.conf"
tar -C "$root" -c . | docker import - "$base" >/dev/null
