#!/usr/bin/env bash
# Makes .venv with the test requirements and checks the style and runs all tests. Arguments go to pytest.
#
#   bash launch/test.sh [PYTEST ARGUMENTS], for example -m slow, or tests/data -x
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
source launch/venv.sh launch/requirements-test.txt
ruff format --quiet --check .
ruff check --quiet .
if command -v node > /dev/null; then pyright; else echo "Types are not checked: pyright needs Node.js." >&2; fi
exec python -m pytest -n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile "$@"
