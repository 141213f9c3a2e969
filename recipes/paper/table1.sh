#!/usr/bin/env bash
# Tables 1 and 2: the methods. The first row of Table 3 equals GKD, so the paper's GKD has beta 0.9.
. "$(dirname "$0")/preamble.sh"

row seqkd text --method seqkd
row supervised-kd teacher --method supervised-kd
row distillm teacher --method distillm
row skd speculative --method skd
row minillm online --method minillm
row gkd online --method gkd --beta 0.9
row tsdkd online
measure
