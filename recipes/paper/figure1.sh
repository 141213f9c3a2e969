#!/usr/bin/env bash
# Figure 1: the mean entropy of student and teacher by position, on the student's responses before training.
LIMIT=${LIMIT:-1000}   # prompts
. "$(dirname "$0")/preamble.sh"

SAMPLE="--limit $LIMIT $SAMPLE"   # with SCALE=tiny, SAMPLE has another --limit, which comes later and counts
record student
tsdkd score --rollouts "$RUN/rollouts-student" --scores "$RUN/scores-student" --signal ranks \
  --student "$STUDENT" --teacher "$TEACHER"
tsdkd inspect --aggregate --scores "$RUN/scores-student" --html "$RUN/figure1.html"
draw figure1 "$RUN/figure1.svg" "$RUN/scores-student"
show_plan
