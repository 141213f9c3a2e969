#!/usr/bin/env bash
# Sets up and runs everything a change must pass: format, lint, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="[dev]" . recipes/setup.sh
ruff format --check .
ruff check .
mypy
python -m pytest "$@"
