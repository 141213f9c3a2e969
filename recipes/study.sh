#!/usr/bin/env bash
# When does TSD-KD help? Ablation, baselines, learning rates, weights, starting points and data, on models that train
# on a CPU: chains of arithmetic, a teacher of 334k parameters, students of 61k. Then three methods on the embedded pair.
#
#   bash recipes/study.sh            SEEDS="0 1 2 3 4" bash recipes/study.sh            EMBEDDED=0 bash recipes/study.sh
#
# All arms of one seed run before the next seed, so an interrupted study is a smaller study. Run it again to continue.
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS=${SEEDS:-0 1 2}
SCALE=${SCALE:-full}       # tiny: one arm, in seconds
EMBEDDED=${EMBEDDED:-1}    # 0 skips the embedded pair
PROMPTS=${PROMPTS:-64}     # for the embedded pair: 8 steps of 8
STORIES=${STORIES:-120}    # on which the embedded pair is evaluated
case $SCALE in full) RUN=${RUN:-runs/study} ;; *) RUN=${RUN:-runs/study-$SCALE} ;; esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # more threads do not speed up models of this size

. recipes/setup.sh

python -m recipes.study.run "$RUN" --seeds "${SEEDS// /,}" --scale "$SCALE"
python -m recipes.study.report "$RUN" "$RUN/report"

if [ "$EMBEDDED" = 1 ]; then
  pair=$RUN/pair
  generate="--engine transformers --temperature 0.5 --max-new-tokens 32 --batch-size 64"
  before=$(python -c "from tsdkd.cli.defaults import embedded_student; print(embedded_student())")
  tsdkd generate --run "$pair/held-out" --policy teacher --prompts tsdkd/stages/data/embedded/held_out.jsonl $generate
  tsdkd score --run "$pair/held-out"
  for seed in $SEEDS; do
    run=$pair/seed-$seed
    tsdkd generate --run "$run" --seed "$seed" --limit "$PROMPTS" $generate
    tsdkd score --run "$run"
    learn() { tsdkd train --run "$run" --checkpoint "$run/$1" --seed "$seed" --epochs 1 --batch-size 8 --learning-rate 3e-5 "${@:2}"; }
    learn gkd --method gkd --beta 0.9
    learn tsdkd
    learn tsdkd-mild --direct-weight 10 --em-weight 0.01
    tsdkd eval --results "$pair/results" --tasks embedded --limit "$STORIES" --held-out "$pair/held-out" --model "before=$before" \
      --model "gkd-$seed=$run/gkd" --model "tsdkd-$seed=$run/tsdkd" --model "tsdkd-mild-$seed=$run/tsdkd-mild"
  done
  python -m recipes.study.report "$RUN" "$RUN/report"
fi
echo "tables and plots: $RUN/report"
