#!/usr/bin/env bash
# After each job, as the runner's user: stops the container of this job if its steps did not come
# to it, and takes back files that a container left as somebody else's, which the next checkout
# could not remove. It never fails a job: the job's own result stands.
set -u

warn() {
  printf '::warning::%s\n' "$1"
}

label="${GITHUB_RUN_ID:-}-${GITHUB_RUN_ATTEMPT:-}"
if [[ $label =~ ^[0-9]+-[0-9]+$ ]]; then
  # 200 s for the container to save; the runner sets no limit of its own to a hook.
  timeout 280 mainrun launch --stop "$label" || warn "the container of job $label could not be stopped"
fi

workspace=${GITHUB_WORKSPACE:-}
if [[ -n $workspace && -d $workspace ]]; then
  foreign=$(find "$workspace" -xdev ! -user "$(id -u)" -print -quit 2>/dev/null) || true
  if [[ -n $foreign ]]; then
    # Only root may give files away, so a container does it; it sees the workspace and nothing else.
    docker run --rm --network none --read-only --user 0:0 --cap-drop ALL \
      --cap-add CHOWN --cap-add DAC_READ_SEARCH --security-opt no-new-privileges \
      --entrypoint chown --volume "$workspace:/workspace" mainrun:current \
      --recursive --no-dereference "$(id -u):$(id -g)" /workspace \
      || warn "files of another user are left in $workspace, such as $foreign"
  fi
fi
exit 0
