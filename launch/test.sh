#!/usr/bin/env bash
# Makes .venv with the test requirements and runs all tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/venv.sh launch/requirements-test.txt
exec python -m pytest -n "$(nproc)" --dist loadfile "$@"
