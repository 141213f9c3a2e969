#!/usr/bin/env bash
# The whole story on an embedded pair, without a GPU and without a hub:
#
#   teacher  SmolLM2-135M-Instruct        student  the same model without DROP of its layers
#   generate -> score -> train -> eval, then one table.
#
#   bash recipes/quickstart.sh            SEED=1 bash recipes/quickstart.sh        GKD=1 bash recipes/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."

RUN=${RUN:-runs/quickstart}
SEED=${SEED:-0}
GKD=${GKD:-0}   # 1: also train the direct term alone, ungated, on the same scores
EPOCHS=2
TRAIN="--seed $SEED --epochs $EPOCHS --batch-size 8 --learning-rate 2e-5"

. recipes/setup.sh
started=$SECONDS

tsdkd generate --run "$RUN" --seed "$SEED" --temperature 0.5 --max-new-tokens 32 --batch-size 64
tsdkd score --run "$RUN"
tsdkd train --run "$RUN" $TRAIN --em-weight 0.1

# Held-out: the teacher's own answers to prompts that nobody was trained on.
tsdkd generate --run "$RUN/heldout" --policy teacher --prompts tsdkd/embedded/heldout.jsonl \
  --temperature 0.5 --max-new-tokens 32 --batch-size 64
tsdkd score --run "$RUN/heldout"

models=()
if [ "$GKD" = 1 ]; then
  tsdkd train --run "$RUN" $TRAIN --alpha 0 --em-weight 0 --no-gate --checkpoint "$RUN/gkd"
  models=(--also "gkd=$RUN/gkd")
fi
tsdkd eval --run "$RUN" --heldout "$RUN/heldout" "${models[@]}"
echo "quickstart: $((SECONDS - started)) seconds after the install"
