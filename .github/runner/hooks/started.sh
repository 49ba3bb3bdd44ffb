#!/usr/bin/env bash
# Before each job, as the runner's user: refuses what must not run here, and stops what a lost
# runner left behind. GitHub's runner calls it without arguments, with `bash -e -o pipefail`, and
# fails the job when it fails; so nothing but a refusal may end it with an error.
#
# $1: the file that names the one repository to serve. It is root's: a workflow can set variables,
# and the user of the runner owns the runner's folder.
set -u
repository_file=${1:-/etc/mainrun/repository}

refuse() {
  printf '::error title=mainrun refuses this job::%s\n' "$1"
  exit 1
}

event=${GITHUB_EVENT_NAME:-unknown}
repository=${GITHUB_REPOSITORY:-unknown}
ref=${GITHUB_REF:-unknown}

served=""
if [[ -r $repository_file ]]; then
  read -r served <"$repository_file" || true
fi
if [[ -z $served ]]; then
  refuse "this machine does not know which repository it serves: run .github/runner/setup.sh --url"
fi
if [[ ${repository,,} != "${served,,}" ]]; then
  refuse "it comes from $repository, and this machine serves $served only"
fi

# An allow list: what strangers can start (pull_request and its kin, issue_comment, workflow_run,
# fork) is many events, and GitHub may add more.
case $event in
  workflow_dispatch | schedule) ;;
  push)
    [[ $ref == refs/heads/main ]] || refuse "a push to $ref: only main is built here"
    ;;
  *) refuse "its event is $event: only workflow_dispatch, schedule and push to main run here" ;;
esac
if [[ $ref == refs/pull/* ]]; then
  refuse "$ref is a pull request: what it changes has not been reviewed"
fi

if ! timeout 240 mainrun launch --reap; then
  echo "::warning::strays of earlier jobs could not be looked for; this job goes on"
fi
exit 0
