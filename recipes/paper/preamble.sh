# Sourced by the recipes of this folder: which models and prompts, what a row of a table is, how the rows are measured.
#
#   PAIR=qwen2.5|gemma2|qwen3   the paper's teacher and student
#   ROWS="gkd tsdkd"            only these rows
#   SCALE=tiny                  the embedded pair on a CPU, a step or two: does everything run?
#   DRY_RUN=1                   nothing runs; `tsdkd plan` says what would, and what it would take
#
# Rows of one name are one model in all tables of a pair, so all share one directory: what is there is not made again, and
# the same line again goes on where an interruption left it.
set -euo pipefail
cd "$(dirname "$0")/../.."

PAIR=${PAIR:-qwen2.5}
SCALE=${SCALE:-paper}
RUN=${RUN:-runs/$SCALE/$PAIR}
SEED=${SEED:-0}
ROWS=${ROWS:-}

# Table 10. Batches of 128, three epochs, warm-up and cosine are tsdkd's defaults; 512 tokens each make its length of 1,024.
PROMPTS=${PROMPTS:-openbmb/UltraInteract_sft}
COLUMN=${COLUMN:-instruction}
COUNT=${COUNT:-86000}   # of its distinct prompts, about; what the plan reckons with
SAMPLE="--max-prompt-tokens 512 --max-new-tokens 512"
HELD_OUT="--held-out 0.05 --eval-steps 50"   # what DistiLLM's schedule follows
EVAL=${EVAL:---engine vllm --allow-code-execution}   # MBPP runs programs, confined
TRAIN=${TRAIN:-}   # more options, such as --micro-batch-size 4 --gradient-checkpointing
EXTRAS=${EXTRAS-[vllm]}

stop() {  # CAUSE REMEDY
  printf 'error: %s\ntry:   %s\n' "$1" "$2" >&2
  exit 2
}

case $PAIR in
  qwen2.5) TEACHER=${TEACHER:-Qwen/Qwen2.5-14B-Instruct} STUDENT=${STUDENT:-Qwen/Qwen2.5-1.5B-Instruct} RATE=5e-6 PAPER=${PAPER:-qwen2.5} ;;
  gemma2) TEACHER=${TEACHER:-google/gemma-2-9b-it} STUDENT=${STUDENT:-google/gemma-2-2b-it} RATE=1e-7 PAPER=gemma2 ;;
  qwen3) TEACHER=${TEACHER:-Qwen/Qwen3-8B} STUDENT=${STUDENT:-Qwen/Qwen3-1.7B} RATE=5e-6 PAPER=qwen3 ;;   # the paper names no rate for it
  *) stop "There is no pair $PAIR." "PAIR=qwen2.5, gemma2 or qwen3." ;;
esac

case $SCALE in
  paper) ;;
  tiny)
    TEACHER=embedded-teacher STUDENT=embedded-student EXTRAS=
    PROMPTS=tsdkd/stages/data/embedded/prompts.jsonl COLUMN=prompt
    SAMPLE="--engine transformers --limit 2 --max-prompt-tokens 128 --max-new-tokens 2"
    HELD_OUT="--held-out 0.5 --eval-steps 1"
    EVAL="--tasks embedded --limit 2"
    TRAIN="--lora --lora-rank 1 --lora-targets q_proj --epochs 1 --batch-size 1" ;;
  *) stop "There is no scale $SCALE." "SCALE=paper or tiny." ;;
esac

. recipes/setup.sh

if [ "${DRY_RUN:-0}" = 1 ]; then
  plan=$(mktemp)
  trap 'rm -f "$plan"' EXIT
  tsdkd() { { printf tsdkd; printf ' %q' "$@"; echo; } >>"$plan"; }
fi

prompts=(--prompts "$PROMPTS" --column "$COLUMN")
models=(--model "teacher=$TEACHER" --model "student=$STUDENT")
known= recorded= rows=()

# row NAME ANSWERS OPTIONS...: one model, which learns from ANSWERS:
#   fresh         its own, given as it learns (the paper's setting)    speculative   the student's, mended by the teacher
#   teacher       the teacher's                                        text          the teacher's, and not its view of them
# All but the fresh ones are sampled once for all rows. There are no scores: the teacher reads along.
row() {
  known="$known $1"
  case " ${ROWS:-$1} " in *" $1 "*) rows+=("$(printf '%q ' "$@")") ;; esac
}

learn() {  # NAME ANSWERS OPTIONS...
  local name=$1 answers=$2 source=(--teacher "$TEACHER" $SAMPLE)
  shift 2
  case $answers in
    fresh) source+=("${prompts[@]}") ;;
    text) answers=teacher source=(--rollouts "$RUN/rollouts-teacher") ;;
    *) source+=(--rollouts "$RUN/rollouts-$answers" --lambda 0) ;;
  esac
  [ "$answers" = fresh ] || record "$answers"
  tsdkd train --checkpoint "$RUN/$name" --seed "$SEED" --student "$STUDENT" "${source[@]}" \
    --learning-rate "$RATE" $TRAIN "$@"
  models+=(--model "$name=$RUN/$name")
}

record() {  # POLICY
  case $recorded in *" $1 "*) return 0 ;; esac
  recorded="$recorded $1 "
  tsdkd generate --policy "$1" --rollouts "$RUN/rollouts-$1" --seed "$SEED" --student "$STUDENT" --teacher "$TEACHER" \
    "${prompts[@]}" $SAMPLE
}

measure() {  # teacher, student and all rows, beside the published ones
  local name line
  for name in $ROWS; do
    case "$known " in *" $name "*) ;; *) stop "No row is named $name." "ROWS with some of:$known." ;; esac
  done
  for line in "${rows[@]}"; do eval "learn $line"; done
  tsdkd eval --results "$RUN/results" $EVAL "${models[@]}" --paper "$PAPER"
  tsdkd report "$RUN"
  [ "${DRY_RUN:-0}" != 1 ] || command tsdkd plan "$plan" --prompts "$COUNT"
}
