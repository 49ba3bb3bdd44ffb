#!/usr/bin/env bash
# Makes this machine ready for the tests with Docker: an Engine that answers, and a base image that
# needs no registry of images. As root on Debian or Ubuntu; elsewhere it uses the Engine that is there.
set -euo pipefail

base=mainrun-base:test
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
install() {
  as_root apt-get update -qq || true # a fresh machine may have no lists yet
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

if ! docker info >/dev/null 2>&1; then
  if ! command -v dockerd >/dev/null; then
    install docker.io
  fi
  # Not as a service: there may be no init here.
  as_root nohup dockerd >/tmp/dockerd.log 2>&1 &
  for _ in $(seq 60); do
    docker info >/dev/null 2>&1 && break
    sleep 1
  done
  docker info >/dev/null || { tail -n 20 /tmp/dockerd.log >&2; exit 1; }
fi

if docker image inspect "$base" >/dev/null 2>&1; then exit 0; fi
install debootstrap debian-archive-keyring # Ubuntu's debootstrap comes without Debian's keys
root=$(mktemp -d)
trap 'as_root rm -rf "$root"' EXIT
# Where this machine has Debian's own packages from; nowhere, if it is an Ubuntu.
# shellcheck disable=SC2016 # the dollar is apt's
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | sed -n 1p)
packages=ca-certificates,git,libstdc++6,python3,python3-venv
as_root debootstrap --variant=minbase --include="$packages" --force-check-gpg \
  --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
  trixie "$root" "${mirror:-http://deb.debian.org/debian}" >/tmp/debootstrap.log \
  || { tail -n 20 /tmp/debootstrap.log >&2; exit 1; }
# Whom this machine trusts, the image trusts: a package index may stand behind a proxy of its own.
as_root cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
[ ! -f /etc/pip.conf ] || as_root cp -L /etc/pip.conf "$root/etc/pip.conf"
as_root tar -C "$root" -c . | docker import - "$base" >/dev/null
