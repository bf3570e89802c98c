#!/usr/bin/env bash
# Makes a Cloud TPU VM ready: .venv with the TPU requirements, and a bucket mounted at /mnt/bucket whose folders runs, data
# and checkpoints appear in the repository's root, where the configs look for them. Run on every worker by
# queued_resource.sh setup; does again only what is missing.
#
#   bash launch/setup_worker.sh [gs://BUCKET]
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."

mount="${BUCKET_MOUNT:-/mnt/bucket}"
bucket="${1:-}"
bucket="${bucket#gs://}"
if ! command -v python3.11 python3.12 > /dev/null; then # the VM's own is older
  python3 -m pip install --user --quiet --disable-pip-version-check uv
  ~/.local/bin/uv python install --quiet 3.11
  PYTHON="$(~/.local/bin/uv python find 3.11)"
  export PYTHON
fi
# shellcheck source=launch/venv.sh
source launch/venv.sh launch/requirements-tpu.txt

[ -n "$bucket" ] || exit 0

if ! mountpoint -q "$mount"; then
  if ! command -v gcsfuse > /dev/null; then
    packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" \
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    curl -fsSL "$packages/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  sudo mkdir -p "$mount"
  sudo chown "$(id -u):$(id -g)" "$mount"
  # other hosts must see what one wrote at once: no kept listings; folders exist without a marker object
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=200000 "$bucket" "$mount"
fi

# Also when an earlier call has mounted the bucket and then failed: without the links training would write to this VM's disk.
for folder in runs data checkpoints; do
  mkdir -p "$mount/$folder"
  if [ -d "$folder" ] && [ ! -L "$folder" ]; then
    rmdir "$folder" || { echo "$PWD/$folder holds files on this VM's disk: move them to $bucket first" >&2; exit 1; }
  fi
  rm -f "$folder"
  ln -s "$mount/$folder" "$folder"
done
echo "$mount" > .bucket # on_worker.sh looks whether it is still mounted
