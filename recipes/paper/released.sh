#!/usr/bin/env bash
# The released code's deviations from the paper: all of them, and each alone.
. "$(dirname "$0")/preamble.sh"

row tsdkd fresh
row released fresh --method tsdkd-released
for one in ranking opener entropy; do
  row "released-$one" fresh --released "$one"
done
measure
