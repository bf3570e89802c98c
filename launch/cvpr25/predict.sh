#!/usr/bin/env bash
# What the challenge's harness calls in the image: answers inputs/*.npz into outputs/*.npz.
set -euo pipefail
python -m launch.cvpr25.answer --checkpoint "${CHECKPOINT:-/workspace/checkpoint}" --inputs "${INPUTS:-inputs}" --outputs "${OUTPUTS:-outputs}"
