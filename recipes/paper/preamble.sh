# Sourced by the recipes of this directory. It sets models and prompts, defines a row of a table, and measures the rows.
#
#   PAIR=qwen2.5|gemma2|qwen3   the paper's teacher and student
#   ROWS="gkd tsdkd"            only these rows
#   SCALE=tiny                  the embedded pair on a CPU, one or two steps: shows that everything runs
#   DRY_RUN=1                   runs nothing; `tsdkd plan` prints disk, memory and time of each stage
#
# A row of one name is the same model in all tables of a pair, so all tables share one run directory: a complete row is
# skipped, and the same command resumes an interrupted one.
set -euo pipefail
cd "$(dirname "$0")/../.."

PAIR=${PAIR:-qwen2.5}
SCALE=${SCALE:-paper}
RUN=${RUN:-runs/$SCALE/$PAIR}
SEED=${SEED:-0}
ROWS=${ROWS:-}

# Table 10: batch 128, three epochs, warm-up and cosine are the defaults of tsdkd; 512 + 512 tokens are its length of 1,024.
PROMPTS=${PROMPTS:-openbmb/UltraInteract_sft}
COLUMN=${COLUMN:-instruction}
COUNT=${COUNT:-86000}   # its distinct prompts, roughly; used by the plan
SAMPLE="--max-prompt-tokens 512 --max-new-tokens 512"
HELD_OUT="--held-out 0.01 --eval-steps 50"   # in every row; DistiLLM's schedule follows the held-out divergence
EVAL=${EVAL:---engine vllm --allow-code-execution}   # MBPP runs model-written programs in a sandbox
EXAMPLES=${EXAMPLES:-math mbpp}   # the benchmarks of Figure 8
TRAIN=${TRAIN:-}   # more options, such as --micro-batch-size 4 --gradient-checkpointing
if [ "${DRY_RUN:-0}" = 1 ]; then EXTRAS=${EXTRAS-}; else EXTRAS=${EXTRAS-[vllm]}; fi   # a plan needs no vLLM

CHAT=()   # the chat format, in every stage that writes prompts; later stages take that of the responses

stop() {  # CAUSE REMEDY
  printf 'error: %s\ntry:   %s\n' "$1" "$2" >&2
  exit 2
}

case $PAIR in
  qwen2.5) TEACHER=${TEACHER:-Qwen/Qwen2.5-14B-Instruct} STUDENT=${STUDENT:-Qwen/Qwen2.5-1.5B-Instruct} RATE=5e-6 PAPER=${PAPER:-qwen2.5} ;;
  gemma2) TEACHER=${TEACHER:-google/gemma-2-9b-it} STUDENT=${STUDENT:-google/gemma-2-2b-it} RATE=1e-7 PAPER=gemma2 ;;
  qwen3) TEACHER=${TEACHER:-Qwen/Qwen3-8B} STUDENT=${STUDENT:-Qwen/Qwen3-1.7B} RATE=5e-6 PAPER=qwen3   # the paper gives no learning rate
    CHAT=(--chat-template-kwargs '{"enable_thinking": false}') ;;   # table5.sh says why
  *) stop "$PAIR is not a pair." "PAIR=qwen2.5, gemma2 or qwen3." ;;
esac

case $SCALE in
  paper) ;;
  tiny)
    TEACHER=embedded-teacher STUDENT=embedded-student EXTRAS= CHAT=()
    PROMPTS=tsdkd/stages/data/embedded/prompts.jsonl COLUMN=messages
    SAMPLE="--engine transformers --limit 2 --max-prompt-tokens 128 --max-new-tokens 2"
    HELD_OUT="--held-out 0.45 --eval-steps 1"   # one of the first two prompts
    EVAL="--tasks embedded --limit 2" EXAMPLES=embedded
    TRAIN="--lora --lora-rank 1 --lora-targets q_proj --epochs 1 --batch-size 1" ;;
  *) stop "$SCALE is not a scale." "SCALE=paper or tiny." ;;
esac

. recipes/setup.sh

if [ "${DRY_RUN:-0}" = 1 ]; then
  plan=$(mktemp)
  trap 'rm -f "$plan"' EXIT
  tsdkd() { { printf tsdkd; printf ' %q' "$@"; echo; } >>"$plan"; }
fi

prompts=(--prompts "$PROMPTS" --column "$COLUMN")
models=(--model "teacher=$TEACHER" --model "student=$STUDENT")
names=(teacher student)   # the names in models
known= recorded= rows=()

# row NAME RESPONSES OPTIONS...: one model, and the responses that it learns from:
#   online        its own, sampled during training (the paper's setting)    teacher   the teacher's, with its distribution
#   speculative   the student's, corrected by the teacher                   text      the teacher's, without it
# All but the online responses are sampled once for all rows. The teacher is loaded, so no row needs scores.
row() {
  known="$known $1"
  case " ${ROWS:-$1} " in *" $1 "*) rows+=("$(printf '%q ' "$@")") ;; esac
}

learn() {  # NAME RESPONSES OPTIONS...
  local name=$1 responses=$2 source=(--teacher "$TEACHER" $SAMPLE)
  shift 2
  case $responses in
    online) source+=("${prompts[@]}" "${CHAT[@]}") ;;
    text) responses=teacher source=(--rollouts "$RUN/rollouts-teacher") ;;
    *) source+=(--rollouts "$RUN/rollouts-$responses" --lambda 0) ;;
  esac
  [ "$responses" = online ] || record "$responses"
  tsdkd train --checkpoint "$RUN/$name" --seed "$SEED" --student "$STUDENT" "${source[@]}" \
    --learning-rate "$RATE" $HELD_OUT $TRAIN "$@"
  models+=(--model "$name=$RUN/$name")
  names+=("$name")
}

record() {  # POLICY
  case $recorded in *" $1 "*) return 0 ;; esac
  recorded="$recorded $1 "
  local authors=(--student "$STUDENT" --teacher "$TEACHER")
  if [ "$1" = teacher ]; then authors=(--teacher "$TEACHER"); fi
  tsdkd generate --policy "$1" --rollouts "$RUN/rollouts-$1" --seed "$SEED" "${authors[@]}" "${prompts[@]}" $SAMPLE \
    "${CHAT[@]}"
}

measure() {  # evaluates teacher, student and all rows beside the published numbers
  local name line
  for name in $ROWS; do
    case "$known " in *" $name "*) ;; *) stop "No row is named $name." "ROWS with some of:$known." ;; esac
  done
  for line in "${rows[@]}"; do eval "learn $line"; done
  tsdkd eval --results "$RUN/results" $EVAL "${CHAT[@]}" "${models[@]}" --paper "$PAPER"
  tsdkd report "$RUN"
  show_plan
}

show_plan() {  # prints the plan of a dry run
  [ "${DRY_RUN:-0}" != 1 ] || command tsdkd plan "$plan" --prompts "$COUNT"
}

draw() {  # FIGURE OUTPUT ARGUMENTS...: writes OUTPUT with recipes/paper/FIGURE.py and prints its path; not in a dry run
  [ "${DRY_RUN:-0}" != 1 ] || return 0
  python -m "recipes.paper.$1" "${@:2}"
  echo "$2"
}
