#!/usr/bin/env bash
# Figure 4: k, the number of candidates that the teacher ranks.
PAPER=figure-4
COUNTS=${COUNTS:-20}   # 10 is the row tsdkd
. "$(dirname "$0")/preamble.sh"

row tsdkd online
for count in $COUNTS; do
  row "k-$count" online --k "$count"
done
measure
