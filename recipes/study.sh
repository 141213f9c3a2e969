#!/usr/bin/env bash
# When is TSD-KD worth it? Ablation, baselines, learning rates, weights, starting points and data, on models small
# enough to be trained here: chains of arithmetic, a teacher of 344k parameters, students of 61k.
#
#   bash recipes/study.sh                 SEEDS=0 bash recipes/study.sh        SCALE=tiny EMBEDDED=0 bash recipes/study.sh
#
# Every arm of a seed before the next seed, so what there is so far is a study too. Run it again to continue.
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS=${SEEDS:-0 1 2}
SCALE=${SCALE:-full}    # tiny: one arm, in seconds, to see that it runs
RUN=${RUN:-runs/study}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # models this small gain nothing from more threads

. recipes/setup.sh

python -m recipes.study.run "$RUN" --seeds "${SEEDS// /,}" --scale "$SCALE"
python -m recipes.study.report "$RUN" "$RUN/report"
echo "tables and plots: $RUN/report"
