#!/usr/bin/env bash
# Figure 6: beta, from forward KL (0) to reverse KL (1).
PAPER=figure-6
BETAS=${BETAS:-0 1.0}   # 0.9 is the row tsdkd
. "$(dirname "$0")/preamble.sh"

row tsdkd online
for beta in $BETAS; do
  row "beta-$beta" online --beta "$beta"
done
measure
