#!/usr/bin/env bash
# A whole distillation with an embedded pair of models, without a GPU and without a model hub:
#
#   teacher  SmolLM2-135M-Instruct        student  the same model without six of its 30 layers
#   1. off-policy start: the student learns the teacher's responses    2. on-policy: TSD-KD, and GKD from the same start
#   then a table of all models, and a report page.
#
#   bash recipes/quickstart.sh            SEED=1 bash recipes/quickstart.sh        GKD=0 bash recipes/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."

SEED=${SEED:-0}
RUN=${RUN:-runs/quickstart-$SEED}
GKD=${GKD:-1}   # 0: without GKD

SAMPLE="--engine transformers --seed $SEED --temperature 0.5 --max-new-tokens 16 --batch-size 64"
TRAIN="--seed $SEED --batch-size 8"
RATE=5e-6   # the paper's

. recipes/setup.sh
started=$SECONDS

step() {
  number=$((${number:-0} + 1))
  printf '\n== %s of %s: %s\n' "$number" "$((GKD == 1 ? 6 : 5))" "$1"
}

step "the student: the teacher without six of its layers"
tsdkd prune --output "$RUN/before" --drop 6 --limit 4

step "off-policy start: the student learns the teacher's responses"
tsdkd generate --run "$RUN/start" --policy teacher $SAMPLE
tsdkd score --run "$RUN/start" --student "$RUN/before"
tsdkd train --run "$RUN/start" --method supervised-kd $TRAIN --epochs 2 --learning-rate 1e-4

step "on-policy: TSD-KD on the student's own responses"
tsdkd generate --run "$RUN" --student "$RUN/start/checkpoint" $SAMPLE
tsdkd score --run "$RUN"
tsdkd train --run "$RUN" $TRAIN --epochs 1 --learning-rate $RATE

models=(--model "before=$RUN/before" --model "start=$RUN/start/checkpoint" --model "tsdkd=$RUN/checkpoint")
if [ "$GKD" = 1 ]; then
  step "for comparison: GKD from the same start, on the same responses"
  tsdkd train --run "$RUN" --checkpoint "$RUN/gkd" --method gkd --beta 0.9 $TRAIN --epochs 1 --learning-rate $RATE
  models+=(--model "gkd=$RUN/gkd")
fi

# Held-out: the teacher's responses to prompts that are not trained on.
step "held-out responses, to measure the divergence from the teacher on"
tsdkd generate --run "$RUN/held-out" --policy teacher --prompts tsdkd/stages/data/embedded/held_out.jsonl $SAMPLE
tsdkd score --run "$RUN/held-out" --student "$RUN/before"
step "all models on 360 stories"
tsdkd eval --run "$RUN" --tasks embedded --held-out "$RUN/held-out" --model teacher=embedded-teacher "${models[@]}" \
  --baseline before --baseline start
echo "quickstart: $((SECONDS - started)) seconds after the install"
tsdkd report "$RUN"
