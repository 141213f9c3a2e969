#!/usr/bin/env bash
# Tables 7 and 8: an opener of a tenth of the entropy, and the adaptive one.
. "$(dirname "$0")/preamble.sh"

row tsdkd fresh
row tsdkd-adaptive fresh --opener adaptive
measure
