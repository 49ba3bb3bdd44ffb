#!/usr/bin/env bash
# The first commands of the README on a machine that has nothing: a root made by debootstrap, with
# python3, git, ca-certificates and either pip (Debian's, without ensurepip) or uv.
#
#   tests/bare_root.sh SUITE [user|root] [pip|uv] [COMMAND ...]
#
# SUITE is bookworm, trixie, noble or another of Debian's or Ubuntu's. Each COMMAND is a line for
# the shell, in a clone of this repository's HEAD, and must end with 0; without any: `./task train`
# and `./task -x test`. Afterwards nothing outside the clone may have changed but caches, and the
# folders of its last sessions that pytest keeps in /tmp.
# As root, on a machine with debootstrap. Roots are kept as archives in $MAINRUN_ROOTS, by default
# /var/tmp/mainrun-roots; with uv, the `uv` on PATH is put into the root.
set -euo pipefail

suite=${1:?SUITE: bookworm, trixie, noble ...}
who=${2:-user}
installer=${3:-pip}
commands=("${@:4}")
((${#commands[@]})) || commands=("./task train" "./task -x test")

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
archives=${MAINRUN_ROOTS:-/var/tmp/mainrun-roots}

main() {
  [[ $(id -u) == 0 ]] || stop "it makes a root: run it as root"
  case $who in user | root) ;; *) stop "$who: it is user or root" ;; esac
  packages=ca-certificates,git,python3
  case $installer in
    pip) packages+=,python3-pip ;;
    uv) command -v uv >/dev/null || stop "no uv here to put into the root: pip install uv" ;;
    *) stop "$installer: it is pip or uv" ;;
  esac

  root=$(mktemp -d)
  # What is mounted is so for the commands alone, and gone with them: this removes files only.
  trap 'rm -rf --one-file-system "$root" "$root".*' EXIT
  chmod 755 "$root"
  unpack
  trust
  clone
  list >"$root.before"
  local command
  for command in "${commands[@]}"; do
    say "$command"
    inside "$command" || stop "ended with $?: $command"
  done
  list >"$root.after"
  say "outside the checkout, caches aside:"
  diff "$root.before" "$root.after" | grep '^[<>]' >"$root.changed" || true
  cat "$root.changed"
  [[ ! -s $root.changed ]] || stop "the lines above changed"
  say "nothing changed, and every command ended with 0"
}

# From the archive, which is made when there is none.
unpack() {
  local archive=$archives/$suite-$installer.tar mirror=http://deb.debian.org/debian arguments=()
  if [[ ! -f $archive ]]; then
    [[ -x /usr/sbin/debootstrap ]] || stop "no debootstrap here: apt-get install debootstrap"
    case $suite in
      focal | jammy | noble | plucky | questing)
        # Debian's debootstrap may know neither the suite, whose script is that of all others, nor
        # the keys. A universe holds Ubuntu's pip.
        mirror=http://archive.ubuntu.com/ubuntu
        arguments=("--components=main,universe")
        [[ -f /usr/share/keyrings/ubuntu-archive-keyring.gpg ]] \
          || say "no ubuntu-archive-keyring here: the packages' signatures are not checked"
        ;;
    esac
    say "debootstrap $suite from ${MAINRUN_MIRROR:-$mirror}, with $packages"
    arguments+=(--variant=minbase --include="$packages" "$suite" "$root" "${MAINRUN_MIRROR:-$mirror}")
    [[ -e /usr/share/debootstrap/scripts/$suite ]] \
      || arguments+=(/usr/share/debootstrap/scripts/gutsy)
    debootstrap "${arguments[@]}" >"$root.debootstrap" || { tail "$root.debootstrap" >&2; exit 1; }
    mkdir -p "$archives"
    tar -C "$root" -cf "$archive.$$" .
    mv "$archive.$$" "$archive"
  fi
  tar -C "$root" -xf "$archive"
  [[ $installer == pip ]] || cp -L "$(command -v uv)" "$root/usr/local/bin/uv"
}

# Whom this machine trusts, the root trusts: a package index may stand behind a proxy of its own.
trust() {
  local file
  for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    [[ ! -f $file ]] || cp -L --remove-destination "$file" "$root$file"
  done
}

clone() {
  home=/root
  if [[ $who == user ]]; then
    home=/home/newcomer
    chroot "$root" useradd --create-home --shell /bin/sh newcomer
  fi
  checkout=$home/mainrun
  git clone -q --no-hardlinks "$repository" "$root$checkout"
  chroot "$root" chown -R --reference="$home" "$checkout"
}

# In namespaces of their own, so that neither a process nor a mount is left behind.
inside() {
  local name=root settings
  [[ $who == root ]] || name=newcomer
  # How this machine reaches a package index; what names folders of this machine means nothing there.
  mapfile -t settings < <(env | grep -iE '^(PIP_|UV_|SSL_CERT_|[a-z]+_proxy=)' | grep -v FIND_LINKS)
  # shellcheck disable=SC2016 # the inner shell's own arguments
  unshare --mount --pid --fork --kill-child bash -euc '
    mount -t proc proc "$0/proc"
    mount --rbind /dev "$0/dev"
    exec chroot "$@"
  ' "$root" --userspec="$name" "$root" env -i "${settings[@]}" HOME="$home" LANG=C.UTF-8 \
    PATH=/usr/local/bin:/usr/bin:/bin sh -c "cd $checkout && $1" </dev/null
}

# Everything outside the checkout: type, mode, owner, size and time, of folders only that they are.
list() {
  find "$root" -xdev \( -path "$root$checkout" -o -path "$root$home/.cache" -o -name __pycache__ \
    -o -path "$root/tmp/pytest-of-*" \) -prune -o \( -type d -printf '%P/ %m %U:%G\n' -o -printf '%P %y %m %U:%G %s %T@ %l\n' \) | sort
}

say() { printf 'bare root (%s, %s, %s): %s\n' "$suite" "$who" "$installer" "$*"; }

stop() {
  say "$*" >&2
  exit 1
}

main
