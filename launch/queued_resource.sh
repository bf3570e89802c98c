#!/usr/bin/env bash
# A run on Cloud TPU VMs by a queued resource, from the request to the last checkpoint.
#
#   bash launch/queued_resource.sh train --name medplib --type v5litepod-64 --zone us-west4-a --bucket gs://BUCKET [--spot] -- \
#       python -m medplib_jax.train --config=configs/stage4_moe.py:7b --workdir=runs/7b/stage4 --config.mesh.fsdp=64
#
# ACTION: create (ask for it), wait (until it is there), setup (this repository, its .venv and the bucket on every worker), run (the
# command, once), delete, or train (all of these; starts the command again when it ends with 75, and makes the resource anew when it was
# taken away; deletes it at the end).
#
#   --name NAME --zone ZONE --project PROJECT
#   --type v5litepod-64     accelerator type (v5litepod-N, v6e-N and v5p-2N have N chips)
#   --runtime VERSION       TPU software version; found from the type for v4, v5e, v5p and v6e
#   --slices N              several slices, which the mesh's data axis spans
#   --bucket gs://BUCKET    is mounted at /mnt/bucket on every worker
#   --spot                  may be taken away at any time, and costs less
#   --keep                  do not delete the resource at the end of train
#   --max-restarts N        of train, default 100
#   --dry-run               print the commands, run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
LAUNCH="$(cd "$(dirname "$0")" && pwd)"
POLL_SECONDS=30
MAX_ERRORS=10

action="${1:-}"
case "$action" in
  create | wait | setup | run | delete | train) shift ;;
  -h | --help) usage; exit 0 ;;
  *) die "ACTION is one of create, wait, setup, run, delete, train; found '$action'" ;;
esac
parse_options "name type zone project runtime slices bucket spot keep max-restarts" "name zone" "$@"
where=(--zone="${option[zone]}" ${option[project]:+--project="${option[project]}"})
slices="${option[slices]:-1}"

runtime() {
  case "${option[runtime]:-}:${option[type]}" in
    ?*:*) echo "${option[runtime]}" ;;
    :v4-*) echo tpu-ubuntu2204-base ;;
    :v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    :v5p-*) echo v2-alpha-tpuv5 ;;
    :v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "no --runtime known for --type ${option[type]}" ;;
  esac
}

create() {
  [ -n "${option[type]:-}" ] || die "--type is required"
  local version nodes=(--node-id="${option[name]}")
  version="$(runtime)"
  [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="${option[name]}")
  run gcloud compute tpus queued-resources create "${option[name]}" "${where[@]}" --accelerator-type="${option[type]}" \
    --runtime-version="$version" "${nodes[@]}" ${option[spot]:+--spot} \
    --scopes=https://www.googleapis.com/auth/cloud-platform --async
}

# Sets `now` to the resource's state (ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...), or to `gone` when there is none of this
# name. Any other error of gcloud ends this script: at once when gcloud has not worked yet (no project, no login), else after
# MAX_ERRORS in a row (the network).
now='' gcloud_works=''
read_state() {
  local errors=0 said
  local ask=(gcloud compute tpus queued-resources describe "${option[name]}" "${where[@]}" --format='value(state.state)')
  if [ -n "${option[dry-run]:-}" ]; then
    quoted "${ask[@]}"
    now=ACTIVE
    return
  fi
  said="$(mktemp)"
  until now="$("${ask[@]}" 2> "$said")"; do
    if grep -q NOT_FOUND "$said"; then now=gone; break; fi
    cat "$said" >&2
    errors=$((errors + 1))
    if [ -z "$gcloud_works" ] || [ "$errors" -ge "$MAX_ERRORS" ]; then
      rm -f "$said"
      die "the state of ${option[name]} is not known (the error above is gcloud's)"
    fi
    sleep "$POLL_SECONDS"
  done
  rm -f "$said"
  gcloud_works=1
}

wait_until_active() {
  while true; do
    read_state
    case "$now" in
      ACTIVE) return ;;
      gone | FAILED | SUSPENDED | SUSPENDING | DELETING) echo "${option[name]} is $now" >&2; return 1 ;;
      *) echo "$(date +%T) ${option[name]} is $now" >&2 ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

delete() { run gcloud compute tpus queued-resources delete "${option[name]}" "${where[@]}" --force --quiet; }

on_workers() {
  bash "$LAUNCH/run_on_workers.sh" --name "${option[name]}" --slices "$slices" --zone "${option[zone]}" \
    ${option[project]:+--project "${option[project]}"} ${option[dry-run]:+--dry-run} "$@"
}

# Copies the repository as git has it to every worker, and makes it ready to run.
setup() {
  local archive node
  archive="$(mktemp -d)/medplib_jax.tar.gz"
  git -C "$LAUNCH/.." archive --format=tar.gz --prefix=medplib_jax/ -o "$archive" HEAD || return
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:medplib_jax.tar.gz" "${where[@]}" --worker=all || return
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command='tar -xzf ~/medplib_jax.tar.gz -C ~' || return
  done
  rm -r "$(dirname "$archive")"
  on_workers -- bash launch/setup_worker.sh "${option[bucket]:-}"
}

make_ready() {
  now=gone
  [ -n "${option[dry-run]:-}" ] || read_state
  case "$now" in
    gone) create || return ;;
    FAILED | SUSPENDED | SUSPENDING) delete && create || return ;;
  esac
  wait_until_active && setup
}

# 0: finished; 75: to be started again on the same machines; 76: on new ones; else failed for good.
attempt() {
  local code=0
  on_workers -- "${command[@]}" || code=$?
  if [ -n "${option[dry-run]:-}" ] || [ "$code" -eq 0 ]; then return 0; fi
  read_state
  if [ "$now" != ACTIVE ]; then return 76; fi
  if [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; then return 75; fi
  return "$code"
}

# New machines that cannot be had or made ready count as a start, too.
train() {
  local restart code=76
  [ ${#command[@]} -gt 0 ] || die "no COMMAND after --"
  for ((restart = 0; restart <= ${option[max-restarts]:-100}; restart++)); do
    [ "$restart" -eq 0 ] || echo "start $((restart + 1))" >&2
    if [ "$code" -eq 76 ] && ! make_ready; then
      [ "$restart" -gt 0 ] || return 1
      sleep "$POLL_SECONDS"
      continue
    fi
    code=0
    attempt || code=$?
    case "$code" in
      0) [ -n "${option[keep]:-}" ] || delete; return ;;
      75 | 76) ;;
      *) echo "the command failed with $code; ${option[name]} is left as it is" >&2; exit "$code" ;;
    esac
  done
  die "no restart is left"
}

case "$action" in
  wait) wait_until_active ;;
  run)
    [ ${#command[@]} -gt 0 ] || die "no COMMAND after --"
    on_workers -- "${command[@]}" ;;
  *) "$action" ;;
esac
