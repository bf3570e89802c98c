#!/usr/bin/env bash
# Makes a Cloud TPU VM ready: .venv with the TPU requirements, and a bucket mounted at /mnt/bucket whose folders runs, data and checkpoints
# appear in the repository's root, where the configs look for them. Run on every worker by queued_resource.sh setup; does again only
# what is missing.
#
#   bash launch/setup_worker.sh [gs://BUCKET]
set -euo pipefail
cd "$(dirname "$0")/.."

bucket="${1:-}"
bucket="${bucket#gs://}"
if ! command -v python3.11 python3.12 > /dev/null; then # the VM's own is older
  python3 -m pip install --user --quiet uv
  ~/.local/bin/uv python install --quiet 3.11
  PYTHON="$(~/.local/bin/uv python find 3.11)"
  export PYTHON
fi
# shellcheck source=launch/venv.sh
source launch/venv.sh launch/requirements-tpu.txt

if [ -n "$bucket" ] && ! mountpoint -q /mnt/bucket; then
  if ! command -v gcsfuse > /dev/null; then
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  sudo mkdir -p /mnt/bucket
  sudo chown "$(id -u):$(id -g)" /mnt/bucket
  # other hosts must see what one wrote at once: no kept listings; folders exist without a marker object
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "$bucket" /mnt/bucket
  for folder in runs data checkpoints; do
    mkdir -p "/mnt/bucket/$folder"
    ln -sfnT "/mnt/bucket/$folder" "$folder"
  done
fi
