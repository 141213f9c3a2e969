#!/usr/bin/env bash
# Table 6: TSD-KD on the teacher's answers and on the student's own.
PAPER=table-6
. "$(dirname "$0")/preamble.sh"

row off-policy teacher
row tsdkd fresh
measure
