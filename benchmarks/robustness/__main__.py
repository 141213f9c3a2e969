"""Runs the campaigns of this directory one after another, and prints one table of their counts.

    python -m benchmarks.robustness --trials 500 [CAMPAIGN ...]

A campaign is a module of this directory with a `main`; each runs as a process of its own and writes its rows (rows.py).
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.robustness.rows import Row, read_rows, show_rows

ROOT = Path(__file__).parents[2]


def find_campaigns() -> list[str]:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if file.stem != "__main__" and "\ndef main(" in file.read_text()]


def run_campaign(name: str, options: dict[str, str]) -> list[Row]:
    """The rows of a campaign; one row with a fault for a campaign that ends without rows."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.json"
        words = [word for option in {**options, "--json": str(file)}.items() for word in option]
        subprocess.run([sys.executable, "-m", f"benchmarks.robustness.{name}", *words], cwd=ROOT, check=False)
        rows = read_rows(file) if file.exists() else [Row("ended without rows", 0, 1)]
    return [replace(row, name=f"{name}: {row.name}") for row in rows]


def main() -> None:
    campaigns = find_campaigns()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", default=campaigns, metavar="CAMPAIGN", help=", ".join(campaigns))
    parser.add_argument("--trials", type=int, help="trials of each campaign; default: its own")
    parser.add_argument("--seed", type=int, default=0, help="seed that chooses the trials")
    options = parser.parse_args()
    if unknown := set(options.campaigns) - set(campaigns):
        parser.error(f"no campaign {min(unknown)}; there are {', '.join(campaigns)}")
    given = {"--seed": str(options.seed), **({"--trials": str(options.trials)} if options.trials else {})}
    rows = [row for name in options.campaigns for row in run_campaign(name, given)]
    show_rows("Robustness", rows)
    raise SystemExit(any(row.faults for row in rows))


if __name__ == "__main__":
    main()
