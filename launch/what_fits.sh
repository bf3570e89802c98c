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

stage() { # II|III|IV TOPOLOGY ROWS FLAGS...
  local name="$1" topology="$2" rows="$3" config length=1024
  shift 3
  case "$name" in
    II) config=stage2_vqa.py:7b length=2048 ;;
    III) config=stage3_grounding.py:7b ;;
    IV) config=stage4_moe.py:7b ;;
  esac
  examine "stage $name on $topology, $rows rows" "$topology" "$config" --length="$length" --rows="$rows" "$@"
}

generation() { # TOPOLOGY ROWS FLAGS...
  local topology="$1" rows="$2"
  shift 2
  examine "generation, 64 new tokens on $topology, $rows rows" "$topology" stage4_moe.py:7b --program=decode --rows="$rows" --length=2048 --config.mesh.fsdp=1 \
    --config.eval.max_new_tokens=64 "$@"
}

lora() { # III|IV|BiRD ROWS FLAGS... on the eight chips of Kaggle
  local name="stage $1 LoRA" rows="$2" config length=1024
  case "$1" in
    III) config=stage3_grounding.py:7b ;;
    IV) config=finetune_folder.py:7b_v5e8 ;;
    BiRD) name="BiRD LoRA" config=bird_grit.py:lora length=2048 ;;
  esac
  shift 2
  examine "$name on v5e:2x4, $rows rows" v5e:2x4 "$config" --length="$length" --rows="$rows" --config.mesh.fsdp=8 "$@"
}

if [ "$kind" = tpu ]; then
  stage II v5e:8x8 128 --config.mesh.fsdp=64 --config.optim.accumulate=2
  stage III v5e:8x8 192 --config.mesh.fsdp=64
  stage IV v5e:8x8 128 --config.mesh.fsdp=64
  stage IV v5e:8x8 192 --config.mesh.fsdp=64
  for name in II III IV; do
    stage "$name" v5p:2x4x4 128 --config.mesh.data=2 --config.mesh.fsdp=16
  done
  stage IV v5e:4x4 128 --config.mesh.fsdp=16 --config.optim.accumulate=4
  stage II v6e:8x8 256 --config.mesh.fsdp=64
  stage III v6e:8x8 512 --config.mesh.fsdp=64
  stage IV v6e:8x8 384 --config.mesh.fsdp=64
  examine "stage V, 4 pictures on v5e:8x8" v5e:8x8 stage5_icl.py --length=4096
  examine "BiRD on v5e:8x8, 128 rows" v5e:8x8 bird_grit.py:9b --config.mesh.fsdp=64 --rows=128 --config.optim.accumulate=2
  examine "BiRD on v5p:4x4x4, 256 rows" v5p:4x4x4 bird_grit.py:9b --config.mesh.data=4 --config.mesh.fsdp=16 --rows=256
  lora III 8
  lora III 24
  lora III 224 --config.model.remat=full
  lora IV 8
  lora IV 16
  lora IV 128 --config.model.remat=full
  lora BiRD 8
  lora BiRD 16
  lora BiRD 32 --config.model.remat=full
  lora BiRD 88 --config.model.remat=full
  for rows in 1 8 32; do
    generation v5e:2x4 "$rows" --config.mesh.tensor=8
    generation v6e:2x2 "$rows" --config.mesh.tensor=4
  done
  examine "generation, 64 new tokens, KV cache of 8 bits on v5e:2x4, 32 rows" v5e:2x4 stage4_moe.py:7b --program=decode --quantize=kv --rows=32 \
    --length=2048 --config.mesh.fsdp=1 --config.eval.max_new_tokens=64 --config.mesh.tensor=8
  for rows in 1 2; do # a chip of Colab's, with weights of 8 bits
    examine "prediction, 64 new tokens on v5e:1x1, $rows rows" v5e:1x1 stage4_moe.py:7b --program=decode --quantize=int8 --rows="$rows" \
      --length=1024 --config.mesh.fsdp=1 --config.eval.max_new_tokens=64
  done
else
  for gpus in h100:8 h200:8; do
    for rows in 16 32; do
      for name in II III IV; do
        stage "$name" "$gpus" "$rows" --config.mesh.fsdp=8
      done
    done
  done
  examine "BiRD on h200:8, 16 rows" h200:8 bird_grit.py:9b --config.mesh.fsdp=8 --rows=16
  generation h200:1 1
  generation h200:1 32
fi
python -m medplib_jax.aot.table "$folder"/*.json
