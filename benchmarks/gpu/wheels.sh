#!/usr/bin/env bash
# Brings the missing packages to a GPU machine without network; a large wheel is copied there as two pieces.
#
#   bash benchmarks/gpu/wheels.sh download DIR   # on a machine with a package index
#   bash benchmarks/gpu/wheels.sh split DIR      # cuts wheels above LARGEST_KB (50000) into two, and writes their hashes
#   bash benchmarks/gpu/wheels.sh join DIR       # on the GPU machine, after all pieces are copied
#   bash benchmarks/gpu/wheels.sh install DIR    # into python3's environment, without its index and dependencies
set -euo pipefail
[ $# = 2 ] || { sed -n 's/^# \?//p' "$0" | sed 1d >&2; exit 2; }
requirements=$(cd "$(dirname "$0")" && pwd)/requirements.txt
python=${PYTHON:-python3}
LARGEST_KB=${LARGEST_KB:-50000}
mkdir -p "$2"
cd "$2"
case $1 in
  download)
    # The tags of manylinux from 2014 on, each of which pip matches exactly.
    platforms=(--platform manylinux2014_x86_64)
    for minor in 17 24 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
    while read -r package; do
      case $package in \#* | "") continue ;; esac
      # A package without a wheel becomes one; all of these are pure Python.
      "$python" -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest . "$package" ||
        "$python" -m pip wheel --quiet --no-deps --wheel-dir . "$package"
    done <"$requirements"
    du -ch -- *.whl | sort -h
    ;;
  split)
    find . -maxdepth 1 -name '*.whl' -size "+${LARGEST_KB}k" | while read -r wheel; do
      sha256sum "$wheel" >"$wheel.sha256"
      split --number 2 --numeric-suffixes=1 --suffix-length 1 "$wheel" "$wheel.part"
      rm "$wheel"
    done
    ;;
  join)
    for hash in *.sha256; do
      wheel=${hash%.sha256}
      cat "$wheel".part? >"$wheel"
      sha256sum --check "$hash" || { rm "$wheel"; exit 1; }
      rm "$wheel".part? "$hash"
    done
    ;;
  install)
    "$python" -m pip install --no-index --no-deps --no-compile --upgrade ${TARGET:+--target "$TARGET"} -- *.whl
    ;;
  *)
    echo "error: $1 is not download, split, join or install." >&2
    exit 2
    ;;
esac
