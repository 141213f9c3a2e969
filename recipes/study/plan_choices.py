"""How models choose among plans: python -m recipes.study.plan_choices DIRECTORY/plans [ARM TEMPERATURE]

A row per arm, over its responses to the test prompts at temperature 1: the percentage of right responses, the share of
the most frequent plan, and the entropy of the plans. All are means over seeds with 95 % intervals. With an arm, such as
gkd-0.0016, and a temperature, that arm's models also respond at this temperature.
"""

import math
import sys
from collections import Counter
from contextlib import chdir
from pathlib import Path
from statistics import fmean

from recipes.experiment.arms import respond, seed_directories
from recipes.experiment.commands import exit_statuses
from recipes.experiment.measures import read_responses
from recipes.experiment.plans import PLANS
from recipes.experiment.settings import Settings
from recipes.experiment.statistics import format_interval
from recipes.experiment.tables import format_lines
from recipes.experiment.tasks import find_task

COLUMNS = ["", "seeds", "right %", "most frequent plan, % of the responses", "entropy of the plans, nats"]
LENGTH = 2
"""The characters of a response that name its plan."""


def sample(directory: Path, arm: str, temperature: float) -> None:
    """Let an arm's models respond to the test prompts; responses that exist are kept."""
    with chdir(directory):
        task = find_task(Settings(directory.name))
        for output in (seed / arm for seed in seed_directories(Path())):
            model, options = str(output / "checkpoint"), f"--temperature {temperature:g}"
            respond(task, output, model, "test", f"sampled-{temperature:g}", options)


def measure_responses(found: list[tuple[str, str]]) -> tuple[float, float, float]:
    """The fraction of right responses, that of the most frequent plan, and the entropy of the plans in nats."""
    shares = [n / len(found) for n in Counter(response[:LENGTH] for _, response in found).values()]
    right = fmean(PLANS.is_correct(problem, response) for problem, response in found)
    return right, max(shares), -sum(share * math.log(share) for share in shares)


def measure_arms(directory: Path) -> list[list[str]]:
    """A row for each arm of a task and each temperature at which it responded."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for rollouts in (path for seed in seed_directories(directory) for path in sorted(seed.glob("*/sampled*/"))):
        temperature = rollouts.name.removeprefix("sampled").replace("-", " at ")
        found.setdefault(f"{rollouts.parent.name}{temperature}", []).append(measure_responses(read_responses(rollouts)))
    rows = []
    for name, measured in found.items():
        right, most, entropy = zip(*measured, strict=True)
        percent = [format_interval([100 * value for value in values]) for values in (right, most)]
        rows.append([name, str(len(measured)), *percent, format_interval(entropy, 2)])
    return rows


def main() -> None:
    directory, *chosen = sys.argv[1:]
    if chosen:
        arm, temperature = chosen
        with exit_statuses():
            sample(Path(directory), arm, float(temperature))
    sys.stdout.write(format_lines([COLUMNS, *measure_arms(Path(directory))]) + "\n")


if __name__ == "__main__":
    main()
