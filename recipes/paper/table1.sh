#!/usr/bin/env bash
# Tables 1 and 2: ways to distil. Table 3's first row has GKD's numbers, so the paper's GKD has its beta, 0.9.
. "$(dirname "$0")/preamble.sh"

row seqkd text --method seqkd
row supervised-kd teacher --method supervised-kd
row distillm teacher --method distillm $HELD_OUT
row skd speculative --method skd
row minillm fresh --method minillm
row gkd fresh --method gkd --beta 0.9
row tsdkd fresh
measure
