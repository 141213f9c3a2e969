#!/usr/bin/env bash
# Offline training in rounds: each round samples from the student that the last round trained, so rollouts stay on-policy.
#
#   STUDENT=... TEACHER=... PROMPTS=prompts.jsonl ROUNDS=3 bash recipes/rounds.sh
#
# Every stage resumes: after an interruption run the same command again.
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

# How far the student of each round had moved from the one that sampled its rollouts.
for round in $(seq "$ROUNDS"); do
  echo "round $round: $(tsdkd artifact show "$RUN/$round/checkpoint" | grep -E 'candidate_overlap_last|drift_last' | tr -s ' ' | tr '\n' ' ')"
done

tsdkd report "$RUN"   # the rounds side by side
