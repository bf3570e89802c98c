#!/usr/bin/env bash
# Builds launch/Dockerfile and pushes it.
#
#   bash launch/build_image.sh --image us-docker.pkg.dev/PROJECT/REPOSITORY/medplib_jax:TAG [--gpu] [--dry-run]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

parse_options "image gpu" "image" "$@"
requirements=launch/requirements-tpu.txt
[ -z "${option[gpu]:-}" ] || requirements=launch/requirements-gpu.txt
run docker build --platform linux/amd64 -f launch/Dockerfile --build-arg "REQUIREMENTS=$requirements" -t "${option[image]}" .
run docker push "${option[image]}"
