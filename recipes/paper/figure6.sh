#!/usr/bin/env bash
# Figure 6: beta, from forward to reverse KL.
PAPER=figure-6
BETAS=${BETAS:-0 1.0}   # 0.9 is TSD-KD's
. "$(dirname "$0")/preamble.sh"

row tsdkd fresh
for beta in $BETAS; do
  row "beta-$beta" fresh --beta "$beta"
done
measure
