#!/usr/bin/env bash
# The table "What fits where" of README.md: compiles every program of it for its TPUs, without one. A few minutes each.
# usage: bash launch/what_fits.sh FOLDER    (reports that lie there already are kept)
set -euo pipefail
[ $# -eq 1 ] && [ "$1" != --help ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
folder="$(realpath -m "$1")"
cd "$(dirname "$0")/.."
source launch/venv.sh launch/requirements-test.txt # with the TPU's compiler
mkdir -p "$folder"

examine() { # NAME TOPOLOGY CONFIG FLAGS...
  local report="$folder/$1.json" topology="$2" config="$3"
  shift 3
  [ -e "$report" ] || python -m medplib_jax.aot --config="configs/$config.py:7b" --topology="$topology" --json="$report" "$@"
}

stages() { # TOPOLOGY FLAGS...
  local topology="$1"
  shift
  examine "stage II on $topology" "$topology" stage2_vqa --length=2048 "$@"
  examine "stage III on $topology" "$topology" stage3_grounding --length=1024 "$@"
  examine "stage IV on $topology" "$topology" stage4_moe --length=1024 "$@"
}

stages v5e:8x8 --config.mesh.fsdp=64
stages v5p:2x4x4 --config.mesh.data=2 --config.mesh.fsdp=16
stages v6e:8x8 --config.mesh.fsdp=64
stages v5e:4x4 --config.mesh.fsdp=16 --config.optim.accumulate=4
examine "stage IV, expert axis on v5e:8x8" v5e:8x8 stage4_moe --length=1024 --config.mesh.fsdp=32 --config.mesh.expert=2
examine "stage IV, everything trains, AdamW on v5p:4x4x4" v5p:4x4x4 stage4_moe --length=1024 --config.mesh.data=4 --config.mesh.fsdp=16 \
  --config.optim.trainable='("",)' --config.model.lora.rank=0
examine "generation, 64 new tokens on v5e:2x4" v5e:2x4 stage4_moe --program=decode --rows=32 --length=2048 --config.mesh.fsdp=1 --config.mesh.tensor=8 \
  --config.eval.max_new_tokens=64
python -m medplib_jax.aot.table "$folder"/*.json
