# Sourced by the other scripts: makes .venv from pinned requirements when missing or outdated, and activates it.
# usage: source launch/venv.sh REQUIREMENTS_FILE

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3.11}" python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or 3.12 with the venv module is needed (set PYTHON to its path)." >&2
  return 1
}

ensure_venv() {
  local requirements="$1" stamp=".venv/installed-$(basename "$1")" python
  # `activate` is written last: without it an earlier call was interrupted; without the program its Python has gone
  if [ ! -e .venv/bin/activate ] || [ ! -x .venv/bin/python ]; then
    python="$(find_python)"
    echo "Making .venv with $python ..." >&2
    "$python" -m venv --clear .venv
  fi
  if ! cmp -s <(cat launch/requirements*.txt) "$stamp"; then
    echo "Installing $requirements ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore -r "$requirements"
    cat launch/requirements*.txt > "$stamp"
  fi
}

ensure_venv "$1"
source .venv/bin/activate
