#!/usr/bin/env bash
# Figure 4: k, the candidates that are ranked.
PAPER=figure-4
COUNTS=${COUNTS:-20}   # 10 is TSD-KD's
. "$(dirname "$0")/preamble.sh"

row tsdkd fresh
for count in $COUNTS; do
  row "k-$count" fresh --k "$count"
done
measure
