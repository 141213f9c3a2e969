#!/usr/bin/env bash
# Table 9: LoRA adapters in place of full training.
PAPER=table-9
. "$(dirname "$0")/preamble.sh"

row lora-supervised-kd teacher --lora --method supervised-kd
row lora-distillm teacher --lora --method distillm
row lora-minillm online --lora --method minillm
row lora-gkd online --lora --method gkd --beta 0.9
row lora-tsdkd online --lora
measure
