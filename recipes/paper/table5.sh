#!/usr/bin/env bash
# Table 5: Table 1 with Qwen3, without thinking (`enable_thinking` false). The paper names no mode; its numbers fit this
# one (docs/fidelity.md). Qwen3-1.7B's thoughts on GSM8K take about 1,400 tokens, but training has 512 tokens for a
# response and the benchmarks 256 to 1,280, so thinking models would mostly be cut before their answers.
PAIR=${PAIR:-qwen3}
. "$(dirname "$0")/table1.sh"
