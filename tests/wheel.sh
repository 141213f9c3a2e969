#!/usr/bin/env bash
# Builds the wheel and installs it with constraints.txt into a clean environment per extra; runs a tiny chain in each.
#
#   bash tests/wheel.sh            # the extras "" and docs
#   bash tests/wheel.sh vllm       # some other extra, on a machine that can run it
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet build
"$work/build/bin/python" -m build --wheel --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)

# The test helpers without the checkout's own package: the installed one must be found.
mkdir -p "$work/helpers/tests"
cp -r tests/helpers "$work/helpers/tests/"
touch "$work/helpers/tests/__init__.py"

for extra in "${@:-none docs}"; do
  for name in $extra; do
    [ "$name" = none ] && suffix= || suffix="[$name]"
    environment=$work/environment-$name
    "$python" -m venv "$environment"
    "$environment/bin/pip" install --quiet --constraint constraints.txt "$wheel$suffix"
    (
      cd "$work"
      export PATH="$environment/bin:$PATH" PYTHONPATH="$work/helpers" TSDKD_RUN="$work/run-$name" OMP_NUM_THREADS=1
      python -c "import tsdkd, sys; assert sys.prefix in tsdkd.__file__, tsdkd.__file__"
      tsdkd --help >/dev/null
      python - "$TSDKD_RUN" <<'END'
import sys
from pathlib import Path

from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts

directory = Path(sys.argv[1])
directory.mkdir(parents=True)
save_tiny_model(directory / "teacher", seed=1, layers=4)
save_tiny_model(directory / "student", seed=2)
write_prompts(directory / "prompts.jsonl", 4)
END
      models=(--student "$TSDKD_RUN/student" --teacher "$TSDKD_RUN/teacher")
      {
        tsdkd generate --student "$TSDKD_RUN/student" --prompts "$TSDKD_RUN/prompts.jsonl" --engine transformers --max-new-tokens 8
        tsdkd score "${models[@]}" --k 4
        tsdkd train --k 4 --epochs 1 --batch-size 2
        tsdkd eval --model "distilled=$TSDKD_RUN/checkpoint" --tasks embedded --limit 2
        tsdkd report "$TSDKD_RUN"
      } >"$work/chain.log" 2>&1 || { cat "$work/chain.log"; exit 1; }
      tsdkd artifact verify "$TSDKD_RUN/checkpoint"
    )
    echo "wheel$suffix: installed with constraints.txt and run"
    rm -rf "$environment"
  done
done
