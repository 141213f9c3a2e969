#!/usr/bin/env bash
# Tables 7 and 8: an opener with a tenth of the entropy, and the adaptive opener.
. "$(dirname "$0")/preamble.sh"

row tsdkd online
row tsdkd-adaptive online --opener adaptive
measure
