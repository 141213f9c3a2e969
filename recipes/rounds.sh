#!/usr/bin/env bash
# Staged training in rounds: each round's rollouts come from what the last one trained, so they never grow stale.
#
#   STUDENT=... TEACHER=... PROMPTS=prompts.jsonl ROUNDS=3 bash recipes/rounds.sh
#
# Every stage resumes: run the same line again after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."

ROUNDS=${ROUNDS:-3}
RUN=${RUN:-runs/rounds}
GENERATE=${GENERATE:-}   # options of each stage
SCORE=${SCORE:-}
TRAIN=${TRAIN:---epochs 1}

. recipes/setup.sh

student=(${STUDENT:+--student "$STUDENT"})
for round in $(seq "$ROUNDS"); do
  echo "round $round of $ROUNDS"
  tsdkd generate --run "$RUN/$round" --seed "$round" ${student[@]+"${student[@]}"} ${PROMPTS:+--prompts "$PROMPTS"} $GENERATE
  tsdkd score --run "$RUN/$round" ${TEACHER:+--teacher "$TEACHER"} $SCORE
  tsdkd train --run "$RUN/$round" --seed "$round" $TRAIN
  student=(--student "$RUN/$round/checkpoint")
done

# How far each round's student had moved from the one that answered, when the round ended.
for round in $(seq "$ROUNDS"); do
  echo "round $round: $(tsdkd artifact show "$RUN/$round/checkpoint" | grep -E 'candidate_overlap_last|drift_last' | tr -s ' ' | tr '\n' ' ')"
done

tsdkd report "$RUN"   # the rounds side by side
