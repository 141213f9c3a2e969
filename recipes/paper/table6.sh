#!/usr/bin/env bash
# Table 6: TSD-KD off-policy (the teacher's responses) and on-policy (the student's).
PAPER=table-6
. "$(dirname "$0")/preamble.sh"

row off-policy teacher
row tsdkd online
measure
