#!/usr/bin/env bash
# Table 3: what each part adds. The divergence alone is GKD; all parts are TSD-KD.
PAPER=table-3
. "$(dirname "$0")/preamble.sh"

row gkd fresh --method gkd --beta 0.9
row gate fresh --alpha 0 --em-weight 0
row gate+indirect fresh --em-weight 0
row gate+entropy fresh --alpha 0
row tsdkd fresh
measure
