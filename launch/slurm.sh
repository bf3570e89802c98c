#!/usr/bin/env bash
# A run on a GPU cluster with SLURM: one task for each GPU. Submit it from the repository's root, with the cluster's own options:
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh \
#       python -m medplib_jax.train --config=configs/stage4_moe.py:7b --workdir=/shared/runs/7b/stage4 --config.mesh.fsdp=16
#
# With --dry-run before the command it prints what each node would run. SLURM sends SIGTERM two minutes before the time is up or when
# another job takes the nodes: the run saves and exits with 75, and is put into the queue again.
#SBATCH --job-name=medplib
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
MAX_RESTARTS=100

case "${1:-}" in -h | --help) sed -n '2,/^#SBATCH/s/^# \{0,1\}//p' "$0" | grep -v '^#*SBATCH'; exit 0 ;; esac
dry_run=
if [ "${1:-}" = --dry-run ]; then dry_run=1; shift; fi
[ $# -gt 0 ] || { echo "usage: sbatch [SLURM OPTIONS] launch/slurm.sh [--dry-run] COMMAND..." >&2; exit 2; }

# The tasks end each other when one fails, and say why; srun only ends those that have not managed to a minute later.
step=(srun --kill-on-bad-exit=0 --wait=60 --label bash -c '[ ! -d .venv ] || source .venv/bin/activate; exec "$@"' -- "$@")
if [ -n "$dry_run" ]; then
  echo "${step[@]@Q}"
  exit
fi

code=0
"${step[@]}" || code=$?
if { [ "$code" -eq 75 ] || [ "$code" -ge 128 ]; } && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
  echo "exit code $code: job $SLURM_JOB_ID goes into the queue again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
