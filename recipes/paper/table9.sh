#!/usr/bin/env bash
# Table 9: adapters in place of all weights.
PAPER=table-9
. "$(dirname "$0")/preamble.sh"

row lora-supervised-kd teacher --lora --method supervised-kd
row lora-distillm teacher --lora --method distillm $HELD_OUT
row lora-minillm fresh --lora --method minillm
row lora-gkd fresh --lora --method gkd --beta 0.9
row lora-tsdkd fresh --lora
measure
