#!/usr/bin/env bash
# The tables "What fits where" of README.md: compiles every program of one for its TPUs or GPUs, without them. A few minutes each.
# usage: bash launch/what_fits.sh FOLDER [tpu|gpu]    (reports that lie there already are kept)
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
[ $# -ge 1 ] && [[ "${2:-tpu}" =~ ^(tpu|gpu)$ ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
folder="$(cd "$1" && pwd)" kind="${2:-tpu}"
cd "$(dirname "$0")/.."
source launch/venv.sh "launch/requirements-$kind.txt" # with the compiler

examine() { # NAME TOPOLOGY CONFIG FLAGS...
  local name="$1" report="$folder/$1.json" topology="$2" config="$3"
  shift 3
  [ -e "$report" ] || python -m medplib_jax.aot --config="configs/$config" --topology="$topology" --json="$report" "$@" \
    || echo "not compiled: $name" >&2
}

stages() { # TOPOLOGY ROWS FLAGS...
  local topology="$1" rows="$2"
  shift 2
  examine "stage II on $topology, $rows rows" "$topology" stage2_vqa.py:7b --length=2048 --rows="$rows" "$@"
  examine "stage III on $topology, $rows rows" "$topology" stage3_grounding.py:7b --length=1024 --rows="$rows" "$@"
  examine "stage IV on $topology, $rows rows" "$topology" stage4_moe.py:7b --length=1024 --rows="$rows" "$@"
}

generation() { # TOPOLOGY ROWS FLAGS...
  local topology="$1" rows="$2"
  shift 2
  examine "generation, 64 new tokens on $topology, $rows rows" "$topology" stage4_moe.py:7b --program=decode --rows="$rows" --length=2048 --config.mesh.fsdp=1 \
    --config.eval.max_new_tokens=64 "$@"
}

lora() { # TOPOLOGY ROWS FLAGS... (rows of 1,024 positions, BiRD's of 2,048)
  local topology="$1" rows="$2"
  shift 2
  examine "stage III LoRA on $topology, $rows rows" "$topology" stage3_grounding.py:7b --length=1024 --rows="$rows" --config.mesh.fsdp=8 "$@"
  examine "stage IV LoRA on $topology, $rows rows" "$topology" finetune_folder.py:7b_v5e8 --length=1024 --rows="$rows" "$@"
  examine "BiRD LoRA on $topology, $rows rows" "$topology" bird_grit.py:lora --length=2048 --rows="$rows" --config.mesh.fsdp=8 "$@"
}

if [ "$kind" = tpu ]; then
  stages v5e:8x8 128 --config.mesh.fsdp=64
  stages v5p:2x4x4 128 --config.mesh.data=2 --config.mesh.fsdp=16
  stages v6e:8x8 128 --config.mesh.fsdp=64
  stages v5e:4x4 128 --config.mesh.fsdp=16 --config.optim.accumulate=4
  examine "stage IV, expert axis on v5e:8x8" v5e:8x8 stage4_moe.py:7b --length=1024 --config.mesh.fsdp=32 --config.mesh.expert=2
  examine "stage IV, everything trains, AdamW on v5p:4x4x4" v5p:4x4x4 stage4_moe.py:7b --length=1024 --config.mesh.data=4 --config.mesh.fsdp=16 \
    --config.optim.trainable='("",)' --config.model.lora.rank=0
  examine "stage V, 4 pictures, on v5e:8x8" v5e:8x8 stage5_icl --length=4096
  examine "stage IV on v5e:8x8, 192 rows" v5e:8x8 stage4_moe.py:7b --length=1024 --rows=192 --config.mesh.fsdp=64
  examine "stage IV on v6e:8x8, 384 rows" v6e:8x8 stage4_moe.py:7b --length=1024 --rows=384 --config.mesh.fsdp=64
  for rows in 1 8 32; do
    generation v5e:2x4 "$rows" --config.mesh.tensor=8
    generation v6e:2x2 "$rows" --config.mesh.tensor=4
  done
  lora v5e:2x4 8
  lora v5e:2x4 64 --config.model.remat=full
  for rows in 1 8; do # a chip of Colab's, with weights of 8 bits
    examine "prediction, 64 new tokens on v5e:1x1, $rows rows" v5e:1x1 stage4_moe.py:7b --program=decode --quantize=int8 --rows="$rows" \
      --length=1024 --config.mesh.fsdp=1 --config.eval.max_new_tokens=64
  done
  examine "BiRD on v5e:8x8, 256 rows" v5e:8x8 bird_grit.py:9b --config.mesh.fsdp=64
  examine "BiRD on v5p:4x4x4, 256 rows" v5p:4x4x4 bird_grit.py:9b --config.mesh.data=4 --config.mesh.fsdp=16
else
  for gpus in h100:8 h200:8; do
    stages "$gpus" 16 --config.mesh.fsdp=8
    stages "$gpus" 32 --config.mesh.fsdp=8
  done
  examine "BiRD on h200:8, 16 rows" h200:8 bird_grit.py:9b --config.mesh.fsdp=8 --rows=16
  generation h200:1 1
  generation h200:1 32
fi
python -m medplib_jax.aot.table "$folder"/*.json
