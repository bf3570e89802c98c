#!/usr/bin/env bash
# A run on a GKE cluster that xpk made (`xpk cluster create`; `xpk storage attach` mounts the bucket).
#
#   bash launch/xpk.sh --name medplib --cluster CLUSTER --type v5litepod-64 --image IMAGE [--slices N] [--zone Z] [--project P] \
#       [--max-restarts 100] [--dry-run] -- python -m medplib_jax.train --config=configs/stage4_moe.py:7b --workdir=runs/7b/stage4
#
# xpk starts all pods again when one exits with 75 or is killed; it writes the JobSet itself, and its own dry run shows that.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

parse_options "name cluster type image slices zone project max-restarts" "name cluster type image" "$@"
[ ${#command[@]} -gt 0 ] || die "no COMMAND after --"
# exec: SIGTERM must reach the program, not a shell around it
run xpk workload create --workload="${option[name]}" --cluster="${option[cluster]}" --tpu-type="${option[type]}" \
  --num-slices="${option[slices]:-1}" --docker-image="${option[image]}" ${option[zone]:+--zone="${option[zone]}"} \
  ${option[project]:+--project="${option[project]}"} --max-restarts="${option[max-restarts]:-100}" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=300 --command="exec $(quoted "${command[@]}")"
