#!/usr/bin/env bash
# Table 4: Table 1 with Gemma 2.
PAIR=${PAIR:-gemma2}
. "$(dirname "$0")/table1.sh"
