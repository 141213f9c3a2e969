"""Runs the GPU scripts in their order, as many as the time allows; measured figures are skipped.

    python benchmarks/gpu/run.py [--out DIR] [--seconds 840] [--tiny] [a b ...]

Every script writes its JSON after each figure, so that a run that is cut off loses at most the figure in progress.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = {path.name[0]: path for path in sorted(HERE.glob("[a-z]_*.py"))}
LONGEST = 240
"""Seconds of one script."""
LEAST = 20
"""Seconds in which a script can measure something."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="LETTER", help=f"some of {' '.join(SCRIPTS)}; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"))
    parser.add_argument("--seconds", type=float, default=840)
    parser.add_argument("--tiny", action="store_true")
    o = parser.parse_args()
    if unknown := set(o.scripts) - set(SCRIPTS):
        parser.error(f"no script is named {', '.join(sorted(unknown))}; choose from {', '.join(SCRIPTS)}")
    start, codes = time.monotonic(), {}
    for letter in o.scripts or SCRIPTS:
        left = o.seconds - (time.monotonic() - start)
        if left < LEAST:
            break
        limit = min(LONGEST, left)
        words = [sys.executable, SCRIPTS[letter], "--out", o.out, "--seconds", str(limit), *["--tiny"] * o.tiny]
        try:
            codes[letter] = subprocess.run(words, timeout=limit + LEAST / 2, check=False).returncode
        except subprocess.TimeoutExpired:
            codes[letter] = -1
    for letter, path in SCRIPTS.items():
        state = {None: "not begun", 0: "complete", -1: "cut off"}.get(codes.get(letter), "incomplete")
        sys.stdout.write(f"{path.stem}: {state}\n")
    sys.exit(int(any(codes.values())))


if __name__ == "__main__":
    main()
