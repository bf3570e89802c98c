#!/usr/bin/env bash
# Runs one command on every worker of a Cloud TPU (of all slices of a queued resource), in ~/medplib_jax with .venv active.
#
#   bash launch/run_on_workers.sh --name medplib --zone us-west4-a [--slices N] [--project P] [--worker 0] [--dry-run] -- COMMAND...
#
# Output of all workers comes back on this terminal. The exit code is that of the first worker that failed: 75 asks for another start,
# 128 and above mean killed, 255 a broken connection.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

parse_options "name zone project slices worker" "name zone" "$@"
[ ${#command[@]} -gt 0 ] || die "no COMMAND after --"

ended=()
for node in $(nodes); do
  run gcloud compute tpus tpu-vm ssh "$node" --zone="${option[zone]}" ${option[project]:+--project="${option[project]}"} \
    --worker="${option[worker]:-all}" --command="bash medplib_jax/launch/on_worker.sh $(quoted "${command[@]}")" &
  ended+=($!)
done
code=0
for pid in "${ended[@]}"; do
  wait "$pid" || { one=$?; [ "$code" -ne 0 ] || code=$one; }
done
exit "$code"
