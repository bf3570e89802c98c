#!/usr/bin/env bash
# What run_on_workers.sh calls on each worker: runs COMMAND in the repository's root with .venv active.
#
#   bash medplib_jax/launch/on_worker.sh COMMAND...
#
# What an earlier call left running (its connection broke) is ended first: two programs cannot share the chips.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ $# -gt 0 ] || { echo "usage: bash launch/on_worker.sh COMMAND..." >&2; exit 2; }
if [ -s .running ] && [ "$(readlink "/proc/$(cat .running)/cwd")" = "$PWD" ] && kill -KILL -- "-$(cat .running)"; then
  echo "ended what an earlier call had left running" >&2
  sleep 5 # until the chips are free
fi
if [ -s .bucket ] && ! mountpoint -q "$(cat .bucket)"; then
  echo "the bucket is no longer mounted at $(cat .bucket) (was this VM started anew?): run setup again" >&2
  exit 1
fi
# shellcheck source=/dev/null
[ ! -d .venv ] || source .venv/bin/activate
# a process group of its own, so that all of it can be ended
exec setsid --wait bash -c 'echo $$ > .running; exec "$@"' -- "$@"
