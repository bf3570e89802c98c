#!/usr/bin/env bash
# The whole system on a laptop: makes .venv, generates a phantom dataset, trains the four stages of a small MedPLIB,
# evaluates it on held-out examples and writes runs/demo/report.html. Ctrl-C and a second call resume where it stood.
#
#   bash launch/demo.sh [--out runs/demo] [--examples 3000] [--test-examples 100] [--seed 0] [--sweep] [--serve]
#
# With --sweep it then compares the stages' models on every task: runs/demo/evaluation/report.html.
# With --serve it then serves the model of stage IV and opens a browser: http://127.0.0.1:8000/.
# With --bird it trains and evaluates a small BiRD instead, which answers with boxes: runs/demo/bird/evaluation/report.html.
# With --icl it trains and evaluates a small model that draws what examples show: runs/demo/icl/evaluation/report.html.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
requirements=launch/requirements.txt
case " $* " in *" --serve "*) requirements=launch/requirements-serve.txt ;; esac
# in huge pages: mapping a step's memory page by page would take a tenth to a quarter of its time
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
source launch/venv.sh "$requirements"
# not with -m: the processes that make data would import all of it, too
exec python -c "import sys; from launch.demo import main; sys.exit(main())" "$@"
