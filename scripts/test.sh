#!/usr/bin/env bash
# Everything from nothing: a virtual environment if there is none, the dependencies, ruff, the tests.
# Arguments go to pytest: `bash scripts/test.sh tests/test_memory.py -x`.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=dev source scripts/setup.sh
ruff check .
ruff format --check .
python -m pytest "$@"
