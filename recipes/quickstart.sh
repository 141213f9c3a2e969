#!/usr/bin/env bash
# A whole distillation with an embedded pair of models, without a GPU and without a hub:
#
#   teacher  SmolLM2-135M-Instruct        student  the same model without three of its layers
#   generate -> score -> train -> eval, then one table and one report page.
#
#   bash recipes/quickstart.sh            SEED=1 bash recipes/quickstart.sh        GKD=1 bash recipes/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."

SEED=${SEED:-0}
RUN=${RUN:-runs/quickstart-$SEED}
GENERATE="--engine transformers --temperature 0.5 --max-new-tokens 32 --batch-size 64"
GKD=${GKD:-0}   # 1: also train GKD on the same scores

# The paper: 128 responses per step, 5e-6, three epochs of tens of thousands of prompts. Here: 48 steps of 8 responses.
TRAIN="--seed $SEED --epochs 1 --batch-size 8 --learning-rate 3e-5"
# JSD(0.9) is about a tenth of a KL, so with the paper's weights (0.1, 1, 1) the entropy term outweighs it and sharpens a
# student that is often wrong. These weights raise the direct term and lower the entropy term.
WEIGHTS="--alpha 0.1 --direct-weight 10 --em-weight 0.01"

. recipes/setup.sh
started=$SECONDS

tsdkd generate --run "$RUN" --seed "$SEED" $GENERATE
tsdkd score --run "$RUN"
tsdkd train --run "$RUN" $TRAIN $WEIGHTS

# Held-out: the teacher's responses to prompts that are not trained on.
tsdkd generate --run "$RUN/held-out" --policy teacher --prompts tsdkd/stages/data/embedded/held_out.jsonl $GENERATE
tsdkd score --run "$RUN/held-out"

models=()
if [ "$GKD" = 1 ]; then
  tsdkd train --run "$RUN" $TRAIN --method gkd --beta 0.9 --checkpoint "$RUN/gkd"
  models=(--also "gkd=$RUN/gkd")
fi
tsdkd eval --run "$RUN" --tasks embedded --held-out "$RUN/held-out" ${models[@]+"${models[@]}"}
echo "quickstart: $((SECONDS - started)) seconds after the install"
tsdkd report "$RUN"
