#!/usr/bin/env bash
# Makes a Debian or Ubuntu machine ready to run jobs from GitHub, and keeps it so: run it again after
# every `git pull`. What is as it should be stays untouched. docs/runner.md tells the whole way.
set -euo pipefail
umask 022

readonly USER_NAME=mainrun
readonly HOME_DIR=/srv/mainrun
readonly RUNNERS=$HOME_DIR/runners
readonly CODE=/opt/mainrun
readonly SETTINGS=/etc/mainrun
readonly LABELS=(gpu gpu-ops)
readonly LEAST_DRIVER=525
readonly LEAST_ENGINE=24

usage() {
  cat <<'END'
usage: setup.sh [--check] [--url https://github.com/OWNER/NAME] [--token-stdin]
                [--runner-archive FILE --runner-sha256 HEX]

  --check            only say what would be done
  --url URL          the one repository that this machine serves
  --token-stdin      read a registration token from standard input (one line, not shown)
  --runner-archive   actions-runner-linux-x64-VERSION.tar.gz, from github.com/actions/runner
  --runner-sha256    its checksum, as the release page states it
END
}

check=0 url="" token_stdin=0 token="" archive="" sha256=""
changes=0 written=0
left=()

# ---------------------------------------------------------------------------------------------
# Words

say() { printf '%s\n' "$*"; }

stop() {
  printf 'setup.sh: %s\n' "$*" >&2
  exit 2
}

# change "what is done" COMMAND...: does it, or says that it would be done.
change() {
  local what=$1
  shift
  changes=$((changes + 1))
  if ((check)); then
    say "would: $what"
  else
    say "doing: $what"
    "$@"
  fi
}

# What the script cannot do, told again at the end.
leave() { left+=("$*"); }

has() { command -v "$1" >/dev/null 2>&1; }

# Whether systemd runs; in a container or a chroot it does not.
has_systemd() { [[ -d /run/systemd/system ]]; }

# put FILE MODE: writes standard input to it, where it differs; then `written` is 1.
put() {
  local file=$1 mode=$2 text
  text=$(cat; printf x) # command substitution would drop the last line's end
  written=0
  if [[ ! -f $file || $(cat "$file"; printf x) != "$text" ]]; then
    change "write $file" put_now "$file" "$mode" "${text%x}"
    written=1
  fi
}

put_now() {
  mkdir -p "$(dirname "$1")"
  printf '%s' "$3" >"$1.new"
  chmod "$2" "$1.new"
  mv "$1.new" "$1"
}

# folder PATH OWNER MODE
folder() {
  if [[ ! -d $1 || $(stat -c '%U %a' "$1") != "$2 $3" ]]; then
    change "folder $1 of $2, mode $3" install -d -o "$2" -g "$2" -m "$3" "$1"
  fi
}

as_user() { HOME=$HOME_DIR/home runuser -u "$USER_NAME" -- "$@"; }

# ---------------------------------------------------------------------------------------------
# The machine

packages() {
  local wanted=()
  has git || wanted+=(git)
  has docker || wanted+=(docker.io)
  has iptables || wanted+=(iptables)
  python3 -c 'import ensurepip, venv' 2>/dev/null || wanted+=(python3 python3-venv)
  ((${#wanted[@]} == 0)) || change "install ${wanted[*]}" install_packages "${wanted[@]}"
}

install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null
  # From Debian 13 on the client is a package of its own.
  has docker || apt-get install -y -qq --no-install-recommends docker-cli >/dev/null
}

driver() {
  local version
  if ! has nvidia-smi; then
    leave "no NVIDIA driver: jobs run on the CPU until one is installed (docs/runner.md, step 1)"
    return
  fi
  if ! version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
    leave "the NVIDIA driver does not answer: see what nvidia-smi says"
    return
  fi
  version=${version%%.*}
  ((version >= LEAST_DRIVER)) || leave "NVIDIA driver $version: $LEAST_DRIVER or newer is needed"
  toolkit
}

toolkit() {
  if ! has nvidia-ctk; then
    leave "no NVIDIA Container Toolkit: no container sees a GPU (docs/runner.md, step 2)"
  elif ! grep -qs '"nvidia"' /etc/docker/daemon.json; then
    change "tell Docker of the NVIDIA runtime" configure_toolkit
  fi
}

configure_toolkit() {
  nvidia-ctk runtime configure --runtime=docker
  if has_systemd; then systemctl restart docker; fi
}

engine() {
  local version
  has docker || return 0
  if ! version=$(docker version --format '{{.Server.Version}}' 2>/dev/null); then
    leave "Docker does not answer: start it"
  elif ((${version%%.*} < LEAST_ENGINE)); then
    leave "Docker Engine $version: jobs run, but $LEAST_ENGINE or newer is what GPUs ask for"
  fi
}

account() {
  if ! id "$USER_NAME" >/dev/null 2>&1; then
    # No password, no login shell, no keys; uid of the system's range.
    change "user $USER_NAME" useradd --system --user-group --home-dir "$HOME_DIR/home" \
      --no-create-home --shell /usr/sbin/nologin "$USER_NAME"
  fi
  # The package of Docker makes the group; without it there is none yet.
  if getent group docker >/dev/null && [[ " $(groups_of_user) " != *" docker "* ]]; then
    say "note: members of the group docker are root on this machine; let nothing else live here"
    change "$USER_NAME into the group docker" usermod -aG docker "$USER_NAME"
  fi
  if [[ " $(groups_of_user) " == *" sudo "* ]]; then
    leave "$USER_NAME is in the group sudo, and must not be"
  fi
}

groups_of_user() { id -nG "$USER_NAME" 2>/dev/null || true; }

folders() {
  folder "$HOME_DIR" root 755
  folder "$RUNNERS" root 755
  folder "$HOME_DIR/data" root 755 # jobs read it, you fill it
  local name
  for name in home runs cache; do folder "$HOME_DIR/$name" "$USER_NAME" 755; done
  for name in "${LABELS[@]}"; do folder "$RUNNERS/$name" "$USER_NAME" 750; done
  put /etc/tmpfiles.d/mainrun.conf 644 <<<'d /run/lock/mainrun 1777 root root -'
  folder /run/lock/mainrun root 1777
}

settings() {
  if [[ ! -f $SETTINGS/host.yaml ]]; then # afterwards it is yours
    local gpus=auto
    if has nvidia-smi && nvidia-smi -L >/dev/null 2>&1; then gpus=all; fi
    put "$SETTINGS/host.yaml" 644 <<END
# What differs here from config/host.yaml, which states all settings.
gpus: $gpus
runs: $HOME_DIR/runs
cache: $HOME_DIR/cache
data: $HOME_DIR/data
END
  fi
  if [[ -n $url ]]; then
    put "$SETTINGS/repository" 644 <<<"$(repository)"
  elif [[ ! -f $SETTINGS/repository ]]; then
    leave "which repository this machine serves: --url"
  fi
}

repository() {
  local path=${url#https://*/}
  printf '%s' "${path%/}"
}

# ---------------------------------------------------------------------------------------------
# Our own code on the host: for hooks and timers, root's, and not the runner's to change

code() {
  local source commit place before
  source=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  if ! has git; then
    ((check)) || stop "git is not there"
    change "put this checkout into $CODE" true
    return
  fi
  commit=$(in_source git rev-parse HEAD) || stop "$source is no git checkout"
  place=$CODE/$commit
  if [[ ! -f $place/.venv-host/installed.json ]]; then
    change "put commit ${commit:0:12} into $place" install_code "$place"
  fi
  before=$(readlink "$CODE/current" || true)
  if [[ $before != "$place" ]]; then
    [[ -z $before ]] || change "$CODE/previous is the one before" point "$CODE/previous" "$before"
    change "$CODE/current is ${commit:0:12}" point "$CODE/current" "$place"
  fi
  if [[ $(readlink /usr/local/bin/mainrun || true) != "$CODE/current/.venv-host/bin/mainrun" ]]; then
    change "the command mainrun" point /usr/local/bin/mainrun "$CODE/current/.venv-host/bin/mainrun"
  fi
  remove_old_code
  [[ -z $(in_source git status --porcelain) ]] \
    || leave "what is not committed in $source is not in $CODE"
}

# As the owner of the checkout: git distrusts, with reason, what belongs to somebody else.
in_source() { (cd "$source" && runuser -u "$(stat -c %U .)" -- "$@"); }

install_code() {
  rm -rf "$1"
  mkdir -p "$1"
  in_source git archive HEAD | tar -x -C "$1" --no-same-owner
  python3 "$1/requirements/install.py" host
  # Once, by root: who runs it may not write here, and would compile it anew each time.
  "$1/.venv-host/bin/python" -m compileall -q "$1/mainrun"
}

point() {
  ln -sfn "$2" "$1.new"
  mv -T "$1.new" "$1"
}

remove_old_code() {
  local old
  for old in "$CODE"/*/; do
    old=${old%/}
    [[ ${old##*/} =~ ^[0-9a-f]{40}$ ]] || continue
    [[ $old != "$place" && $old != "$(readlink "$CODE/current" || true)" ]] || continue
    [[ $old != "$(readlink "$CODE/previous" || true)" ]] || continue
    change "remove $old" rm -rf "$old"
  done
}

# ---------------------------------------------------------------------------------------------
# The runners

runner_of() {
  local label=$1 dir=$RUNNERS/$1
  unpack "$label" "$dir"
  register "$label" "$dir"
  hooks "$dir"
}

is_busy() { grep -qsaz "^$1/bin/Runner.Worker" /proc/[0-9]*/cmdline; }

unpack() {
  local label=$1 dir=$2
  if [[ -z $archive ]]; then
    [[ -x $dir/run.sh ]] || leave "the program of the runner $label: --runner-archive"
  elif [[ $(cat "$dir/.archive" 2>/dev/null || true) != "$sha256" ]]; then
    if is_busy "$dir"; then
      leave "the runner $label is at work: run this again later to replace its program"
    else
      change "unpack the runner $label" unpack_now "$label" "$dir"
    fi
  fi
}

unpack_now() {
  if has_systemd; then systemctl stop "actions.runner.mainrun.$1.service" 2>/dev/null || true; fi
  as_user tar -xz -C "$2" <"$archive"
  if [[ -x $2/bin/installdependencies.sh ]] && ! ldconfig -p | grep -c libicuuc >/dev/null; then
    "$2/bin/installdependencies.sh" >/dev/null
  fi
  printf '%s\n' "$sha256" >"$2/.archive"
}

register() {
  local label=$1 dir=$2
  [[ ! -f $dir/.runner ]] || return 0
  if [[ -z $url || $token_stdin == 0 ]]; then
    leave "the runner $label is not registered: --url and --token-stdin"
    return
  fi
  [[ -x $dir/config.sh ]] || ((check)) || return 0
  change "register the runner $label at $url" register_now "$label" "$dir"
}

# The token goes through the environment: arguments are seen by everybody on the machine.
register_now() (
  cd "$2"
  export ACTIONS_RUNNER_INPUT_TOKEN=$token
  as_user ./config.sh --unattended --url "$url" --name "$(hostname)-$1" --labels "$1" \
    --work _work </dev/null
)

hooks() {
  local dir=$1 text=""
  [[ -d $dir ]] || ((check)) || return 0
  # config.sh keeps lines of its own in this file.
  if [[ -f $dir/.env ]]; then text=$(grep -v '^ACTIONS_RUNNER_HOOK_JOB_' "$dir/.env" || true); fi
  put "$dir/.env" 644 <<END
${text:+$text
}ACTIONS_RUNNER_HOOK_JOB_STARTED=$CODE/current/.github/runner/hooks/started.sh
ACTIONS_RUNNER_HOOK_JOB_COMPLETED=$CODE/current/.github/runner/hooks/completed.sh
END
}

# ---------------------------------------------------------------------------------------------
# Services

unit() {
  put "/etc/systemd/system/$1" 644
  ((!written)) || units_changed=1
}

services() {
  local label units_changed=0
  for label in "${LABELS[@]}"; do
    # OOMScoreAdjust: when memory runs out, the job goes before the runner that can tell of it.
    # KillMode: a stop signals run.sh, which lets the listener end its job in order.
    unit "actions.runner.mainrun.$label.service" <<END
[Unit]
Description=GitHub runner $label of mainrun
After=network-online.target docker.service
Wants=network-online.target

[Service]
User=$USER_NAME
WorkingDirectory=$RUNNERS/$label
Environment=HOME=$HOME_DIR/home RUNNER_MANUALLY_TRAP_SIG=1
ExecStart=$RUNNERS/$label/run.sh
Restart=always
RestartSec=10
KillMode=process
TimeoutStopSec=5min
OOMScoreAdjust=-500
CPUWeight=200
MemoryMin=512M

[Install]
WantedBy=multi-user.target
END
  done
  unit mainrun-prune.service <<END
[Unit]
Description=Remove old images and stray containers of mainrun
After=docker.service

[Service]
Type=oneshot
User=$USER_NAME
Environment=HOME=$HOME_DIR/home
Nice=10
ExecStart=-/usr/local/bin/mainrun launch --reap
ExecStart=/usr/local/bin/mainrun image prune
END
  unit mainrun-prune.timer <<'END'
[Unit]
Description=Daily: mainrun-prune.service

[Timer]
OnCalendar=daily
RandomizedDelaySec=1h
Persistent=true

[Install]
WantedBy=timers.target
END
  # A cloud machine's own credentials are asked for at this address.
  unit mainrun-metadata.service <<'END'
[Unit]
Description=Keep containers from the metadata address of the cloud
After=docker.service
PartOf=docker.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'iptables -w -C DOCKER-USER -d 169.254.169.254 -j REJECT 2>/dev/null || iptables -w -I DOCKER-USER -d 169.254.169.254 -j REJECT'
ExecStop=-/bin/sh -c 'iptables -w -D DOCKER-USER -d 169.254.169.254 -j REJECT'

[Install]
WantedBy=docker.service
END
  start_services
}

start_services() {
  if ! has_systemd; then
    leave "systemd does not run here: the services are written and not started"
    return
  fi
  ((!units_changed)) || ((check)) || systemctl daemon-reload
  start mainrun-prune.timer
  start mainrun-metadata.service
  local label
  for label in "${LABELS[@]}"; do
    if [[ -f $RUNNERS/$label/.runner ]]; then start "actions.runner.mainrun.$label.service"; fi
  done
}

start() {
  if ! systemctl is-enabled --quiet "$1" 2>/dev/null || ! systemctl is-active --quiet "$1"; then
    change "start $1, now and at every boot" systemctl enable --now "$1"
  fi
}

# ---------------------------------------------------------------------------------------------

parse() {
  while (($#)); do
    case $1 in
      --check) check=1 ;;
      --token-stdin) token_stdin=1 ;;
      --url | --runner-archive | --runner-sha256)
        (($# > 1)) || stop "$1 wants a value"
        case $1 in
          --url) url=$2 ;;
          --runner-archive) archive=$2 ;;
          *) sha256=${2,,} ;;
        esac
        shift
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      *) stop "$1 is no option; see --help" ;;
    esac
    shift
  done
  # A runner of an organisation takes jobs from repositories that nobody here has looked at.
  [[ -z $url || $url =~ ^https://[A-Za-z0-9.-]+/[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+/?$ ]] \
    || stop "--url $url: name one repository, as https://github.com/OWNER/NAME"
  [[ -z $archive || -f $archive ]] || stop "--runner-archive $archive is not there"
  [[ -z $archive || $sha256 =~ ^[0-9a-f]{64}$ ]] \
    || stop "--runner-archive wants --runner-sha256, 64 hexadecimal digits from the release page"
}

verify() {
  local found
  [[ -n $archive ]] || return 0
  found=$(sha256sum "$archive")
  [[ ${found%% *} == "$sha256" ]] \
    || stop "$archive has the checksum ${found%% *}, not $sha256: do not use it"
}

main() {
  parse "$@"
  has apt-get || stop "this is neither Debian nor Ubuntu: docs/runner.md tells what to do by hand"
  [[ $(uname -m) == x86_64 ]] || stop "$(uname -m): only x86_64 is supported"
  ((check)) || [[ $(id -u) == 0 ]] || stop "run it as root, or with --check"
  verify
  if ((token_stdin)) && ((!check)); then
    if [[ -t 0 ]]; then printf 'Registration token: ' >&2; fi
    read -r -s token || [[ -n $token ]] || stop "no token came on standard input"
  fi

  packages
  account
  engine
  driver
  folders
  settings
  code
  local label
  for label in "${LABELS[@]}"; do runner_of "$label"; done
  services

  if ((check)); then
    say "$changes changes would be made"
  else
    say "$changes changes made"
  fi
  ((${#left[@]} == 0)) || printf 'left to you: %s\n' "${left[@]}"
}

main "$@"
