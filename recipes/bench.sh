#!/usr/bin/env bash
# Compares methods under one protocol: the same student, prompts, seeds and number of responses, a search of the learning
# rate on a validation split, and differences to GKD on a test split, paired by seed.
#
#   bash recipes/bench.sh                                  TASK=plans METHODS="tsdkd tip my_method.py" bash recipes/bench.sh
#   DRY_RUN=1 bash recipes/bench.sh                        SEEDS="1 2 3 4 5 6" bash recipes/bench.sh
#   TEACHER=DIR STUDENT=DIR PROMPTS=FILE BENCHMARK=gsm8k bash recipes/bench.sh
#
# For your own task also: RESPONSE_TOKENS=1024 ENGINE=vllm WORKERS=1 EVAL_OPTIONS="--limit 500 --engine vllm"
#
# The bench shows its plan in hours before the first training, and refuses a plan of more than HOURS. Run the same line
# again to continue; more METHODS, SEEDS or FACTORS add arms.
set -euo pipefail
METHODS=${METHODS:-}        # all; or names, and files of your own methods; gkd is always added
methods=
for method in $METHODS; do  # paths of files start at the caller's directory
  case $method in *.py) method=$(realpath "$method") ;; esac
  methods="$methods $method"
done
for name in TEACHER STUDENT PROMPTS; do
  [ ! -e "${!name:-}" ] || printf -v "$name" %s "$(realpath "${!name}")"
done
cd "$(dirname "$0")/.."

TASK=${TASK:-$([ -n "${TEACHER:-}${STUDENT:-}${PROMPTS:-}${BENCHMARK:-}" ] && echo own || echo sums)}   # also plans, plans-short, plans-one, embedded
SCALE=${SCALE:-full}        # tiny: shows that it runs, in seconds
case $SCALE in full | tiny) ;; *)
  printf 'error: No scale is named %s.\ntry:   SCALE=full or SCALE=tiny.\n' "$SCALE" >&2
  exit 2 ;;
esac
SEEDS=${SEEDS:-$([ "$SCALE" = tiny ] && echo "1 2" || echo "1 2 3 4")}
FACTORS=${FACTORS:-0.25 1 4 16}   # of the task's learning rate
WORKERS=${WORKERS:-2}       # processes, each with one core
HOURS=${HOURS:-12}
RUN=${RUN:-runs/bench/$TASK$([ "$SCALE" = full ] || echo "-$SCALE")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # more threads do not speed up models of this size

. recipes/setup.sh

exec python -m recipes.bench.run "$RUN" --task "$TASK" --scale "$SCALE" --methods "$methods" --seeds "$SEEDS" \
  --factors "$FACTORS" --workers "$WORKERS" --hours "$HOURS" --teacher "${TEACHER:-}" --student "${STUDENT:-}" \
  --prompts "${PROMPTS:-}" --benchmark "${BENCHMARK:-}" --eval-options="${EVAL_OPTIONS:-}" \
  --engine "${ENGINE:-transformers}" --response-tokens "${RESPONSE_TOKENS:-512}" $([ "${DRY_RUN:-0}" = 1 ] && echo --plan-only)
