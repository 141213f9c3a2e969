"""How models choose among plans, a row per arm: python -m recipes.study.plan_choices DIRECTORY/plans

The choices are those of the responses to the test prompts at temperature 1: the share of the most frequent plan, and
the entropy of the plans over the responses. Both are means over seeds with 95 % intervals.
"""

import math
import sys
from collections import Counter
from pathlib import Path

from recipes.experiment.arms import seed_directories
from recipes.experiment.statistics import format_interval
from recipes.experiment.tables import format_lines
from tsdkd.artifacts.reader import read_artifact

COLUMNS = ["", "seeds", "most frequent plan, % of the responses", "entropy of the plans, nats"]
LENGTH = 2
"""The characters of a response that name its plan."""


def count_plans(rollouts: Path) -> Counter[str]:
    responses = read_artifact(rollouts, "rollouts").table().column("response").to_pylist()
    return Counter(response[:LENGTH] for response in responses)


def entropy(counts: Counter[str]) -> float:
    """The entropy of the relative frequencies, in nats."""
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


def measure_arms(directory: Path) -> list[list[str]]:
    """A row for each arm of a task that has sampled responses."""
    found: dict[str, list[Counter[str]]] = {}
    for rollouts in (path for seed in seed_directories(directory) for path in sorted(seed.glob("*/sampled"))):
        found.setdefault(rollouts.parent.name, []).append(count_plans(rollouts))
    return [
        [
            *(name, str(len(seeds))),
            format_interval([100 * max(counts.values()) / counts.total() for counts in seeds]),
            format_interval([*map(entropy, seeds)], 2),
        ]
        for name, seeds in found.items()
    ]


def main() -> None:
    sys.stdout.write(format_lines([COLUMNS, *measure_arms(Path(sys.argv[1]))]) + "\n")


if __name__ == "__main__":
    main()
