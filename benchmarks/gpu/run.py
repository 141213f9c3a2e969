"""Runs the GPU scripts in their order, as many as the time allows, and prints all tables; measured figures are skipped.

    python -m benchmarks.gpu.run [--out DIR] [--seconds 540] [--tiny] [a b ...] [-- OPTIONS OF f]

Scripts get at most four minutes each; f is the last one and gets the rest. A script writes its JSON after each figure:
whatever ends it or this driver, at most the figure in progress is lost. With --seconds 0 it only prints the tables.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import DEVICE_LOST, argument_parser, screen, show, start

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.name[0]: f"benchmarks.gpu.{path.stem}" for path in sorted(Path(__file__).parent.glob("[a-z]_*.py"))}
QUEUE = "f"
"""The script that takes all remaining time: its figures are single runs that resume."""
LONGEST = 240
"""Seconds of any other script."""
GRACE = 40
"""Seconds before its end in which a script begins no figure."""
LEAST = 60
"""Seconds in which a script can measure something."""
NOT_STARTED = f"not started, fewer than {LEAST} seconds are left"
COMPLETE = "complete"


def run_script(letter: str, seconds: float, arguments: Sequence[str]) -> int | None:
    """The exit code of a script; None for one that takes longer than `seconds`."""
    words = [
        sys.executable,
        "-m",
        SCRIPTS[letter],
        "--seconds",
        f"{seconds - GRACE:.0f}",
        *arguments,
    ]
    process = start(words, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def run_scripts(
    letters: Sequence[str], seconds: float, arguments: Sequence[str], queue: Sequence[str]
) -> dict[str, str]:
    """Run scripts one after another. Returns the state of each that was started."""
    end, states = time.monotonic() + seconds, {}
    for letter in letters:
        code: int | None = DEVICE_LOST
        while code == DEVICE_LOST and (left := end - time.monotonic()) >= LEAST:
            more = queue if letter == QUEUE else ()
            code = run_script(letter, left if letter == QUEUE else min(LONGEST, left), [*arguments, *more])
            states[letter] = {0: COMPLETE, None: "stopped, its time is over", DEVICE_LOST: "lost its device"}.get(
                code, f"incomplete (exit code {code})"
            )
    return states


def default_letters(queue: Sequence[str]) -> list[str]:
    """All scripts, the one that takes the remaining time as the last, if it has options."""
    return [*(letter for letter in SCRIPTS if letter != QUEUE), *[QUEUE] * bool(queue)]


def read_figures(letter: str, out: Path) -> dict[str, Any]:
    """The JSON of a script; empty if it has measured nothing."""
    path = out / f"{SCRIPTS[letter].rpartition('.')[2]}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    words = [*sys.argv[1:], "--"]
    split = words.index("--")
    own, queue = words[:split], words[split + 1 : -1]
    parser = argument_parser(__doc__, 540)
    parser.add_argument(
        "scripts", nargs="*", metavar="LETTER", help=f"some of {' '.join(SCRIPTS)}; default: all, f if it has options"
    )
    options = parser.parse_args(own)
    if unknown := set(options.scripts) - set(SCRIPTS):
        parser.error(f"no script is named {', '.join(sorted(unknown))}; choose from {', '.join(SCRIPTS)}")
    letters, out = options.scripts or default_letters(queue), options.out.resolve()
    states = run_scripts(letters, options.seconds, ["--out", str(out), *["--tiny"] * options.tiny], queue)
    saved = {letter: read_figures(letter, out) for letter in SCRIPTS}
    for content in filter(None, saved.values()):
        show(content)
    for letter in letters:
        states.setdefault(letter, COMPLETE if saved[letter].get("complete") else NOT_STARTED)
        screen.print(f"{SCRIPTS[letter]}: {states[letter]}", markup=False)
    sys.exit(int(any(state != COMPLETE for state in states.values())))


if __name__ == "__main__":
    main()
