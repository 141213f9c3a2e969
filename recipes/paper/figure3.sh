#!/usr/bin/env bash
# Figure 3: the opener's share c of the entropy.
PAPER=figure-3
SHARES=${SHARES:-0.05 0.2 0.5 1.0}   # 0.1 is TSD-KD's
. "$(dirname "$0")/preamble.sh"

row tsdkd fresh
for share in $SHARES; do
  row "c-$share" fresh --opener "$share"
done
measure
