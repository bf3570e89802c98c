#!/usr/bin/env bash
# Follows docs/start.md as someone new does: a fresh clone of the last commit, a fresh home, the commands as they stand there.
# Ends with an error when no mask was drawn. Some 15 minutes on two cores; continuous integration runs it.
#
#   bash launch/follow_start.sh [FOLDER]    # FOLDER: where clone and home are made; a new one below /tmp by default
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
repository="$(cd "$(dirname "$0")/.." && pwd)"
place="${1:-$(mktemp -d)}"
mkdir -p "$place/home"
git clone --quiet "$repository" "$place/medplib_jax"
cd "$place/medplib_jax"
# the first block of the page
awk '/^```/ { if (inside) exit; inside = 1; next } inside' docs/start.md > "$place/commands.sh"
grep -q predict "$place/commands.sh" || { echo "docs/start.md does not begin with the commands" >&2; exit 1; }
echo "Following docs/start.md in $place:" >&2
cat "$place/commands.sh" >&2
# nothing of this machine but its programs
env -i PATH="$PATH" HOME="$place/home" PYTHON="${PYTHON:-}" bash -euo pipefail "$place/commands.sh"
ls answer/mask*.png answer/overlay.png
