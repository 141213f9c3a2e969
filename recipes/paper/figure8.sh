#!/usr/bin/env bash
# Figure 8: a document of mathematics and one of code, with the responses of teacher, student, baselines and TSD-KD.
. "$(dirname "$0")/table1.sh"

draw figure8 "$RUN/figure8.md" "$RUN/results" "$EXAMPLES" "${names[@]}"
