#!/usr/bin/env bash
# Table 3: what each term adds. The direct term alone is GKD; all terms are TSD-KD.
PAPER=table-3
. "$(dirname "$0")/preamble.sh"

row gkd online --method gkd --beta 0.9
row gate online --alpha 0 --em-weight 0
row gate+indirect online --em-weight 0
row gate+entropy online --alpha 0
row tsdkd online
measure
