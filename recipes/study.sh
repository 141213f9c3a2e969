#!/usr/bin/env bash
# When does TSD-KD help? Its terms, weights, learning rates, students, teachers and responses, each against GKD under the
# same conditions: on sums and plans, whose models train from scratch on a CPU, and on the embedded pair.
#
#   bash recipes/study.sh                                  TASKS="sums" SEEDS="1 2 3 4 5 6" bash recipes/study.sh
#
# Run the same line again to continue. The study skips an arm that a bench in the same RUN has run.
set -euo pipefail
cd "$(dirname "$0")/.."

TASKS=${TASKS:-}            # all; or some of sums, plans, plans-one, plans-short, embedded
METHODS=${METHODS:-}        # all; or some, such as "tsdkd tsdkd-mild", with the arms that they are compared with
SCALE=${SCALE:-full}        # tiny: two arms of untrained models, in seconds
SEEDS=${SEEDS:-$([ "$SCALE" = tiny ] && echo "1 2" || echo "1 2 3 4")}
WORKERS=${WORKERS:-2}       # processes, each with one core
RUN=${RUN:-runs/bench$([ "$SCALE" = full ] || echo "-$SCALE")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # more threads do not speed up models of this size

. recipes/setup.sh

python -m recipes.study.run "$RUN" --tasks "$TASKS" --methods "$METHODS" --seeds "$SEEDS" --scale "$SCALE" --workers "$WORKERS"
python -m recipes.study.report "$RUN" "$RUN/study"
echo "tables, rows and plots: $RUN/study"
