#!/usr/bin/env bash
# Figure 3: the fraction c of a response's entropy that the opener holds.
PAPER=figure-3
FRACTIONS=${FRACTIONS:-0.05 0.2 0.5 1.0}   # 0.1 is the row tsdkd
. "$(dirname "$0")/preamble.sh"

row tsdkd online
for fraction in $FRACTIONS; do
  row "c-$fraction" online --opener "$fraction"
done
measure
