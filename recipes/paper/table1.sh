#!/usr/bin/env bash
# Tables 1 and 2: ways to distil. Table 3's first row has GKD's numbers, so the paper's GKD has its beta, 0.9.
. "$(dirname "$0")/preamble.sh"

row seqkd text --objective seqkd
row supervised-kd teacher --objective supervised-kd
row distillm teacher --objective distillm $HELD_OUT
row skd speculative --objective skd
row minillm fresh --objective minillm
row gkd fresh --objective gkd --beta 0.9
row tsdkd fresh
measure
