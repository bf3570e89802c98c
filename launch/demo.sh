#!/usr/bin/env bash
# The whole system on a laptop: makes .venv, generates a phantom dataset, trains the four stages of a small MedPLIB,
# evaluates it on held-out examples and writes runs/demo/report.html. Ctrl-C and a second call resume where it stood.
# With --sweep it then compares the stages' models on every task: runs/demo/evaluation/report.html.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh launch/requirements.txt
exec python -m launch.demo "$@"
