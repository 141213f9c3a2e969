#!/usr/bin/env bash
# The three deviations of the released code from the paper: together, and one at a time.
. "$(dirname "$0")/preamble.sh"

row tsdkd online
row released online --method tsdkd-released
for deviation in ranking opener entropy; do
  row "released-$deviation" online --released "$deviation"
done
measure
