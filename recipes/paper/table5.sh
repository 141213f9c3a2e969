#!/usr/bin/env bash
# Table 5: Table 1 with Qwen3.
PAIR=${PAIR:-qwen3}
. "$(dirname "$0")/table1.sh"
