#!/usr/bin/env bash
# Figure 5: the share of positions whose entropy is minimised.
PAPER=figure-5
RATIOS=${RATIOS:-1.0}   # 0.1 is TSD-KD's
. "$(dirname "$0")/preamble.sh"

row em-0 fresh --em-weight 0
row tsdkd fresh
for ratio in $RATIOS; do
  row "em-$ratio" fresh --em-ratio "$ratio"
done
measure
