#!/usr/bin/env bash
# Figure 5: the fraction of positions on which the entropy is minimised.
PAPER=figure-5
RATIOS=${RATIOS:-1.0}   # 0.1 is the row tsdkd
. "$(dirname "$0")/preamble.sh"

row em-0 online --em-weight 0
row tsdkd online
for ratio in $RATIOS; do
  row "em-$ratio" online --em-ratio "$ratio"
done
measure
