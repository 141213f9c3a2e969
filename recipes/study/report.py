"""Tables and plots of what has run so far: python -m recipes.study.report PLACE OUTPUT

Seeds are replicates: mean and 95 % interval by Student's t. Differences are paired: seed by seed, from one student.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl
import matplotlib.pyplot as plt
from scipy.stats import t as student_t

from recipes.study.arms import MAIN, QUESTIONS, Arm, Question
from recipes.study.measures import LOG, RESULT

COLUMNS = ["", "accuracy %", "difference, points", "KL", "entropy", "cut off", "repeating", "degenerated"]
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
Results = dict[int, dict[str, dict[str, float]]]
"""By seed and directory."""


def gather(place: Path) -> Results:
    found: Results = {}
    for file in sorted(place.glob(f"seed-*/*/{RESULT}")):
        seed = int(file.parts[-3].removeprefix("seed-"))
        found.setdefault(seed, {})[file.parent.name] = json.loads(file.read_text())
    return found


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± half of the 95 % interval; the mean alone of one value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):.{digits}f} ± {half:.{digits}f}"


def differences(results: Results, slug: str, reference: str) -> list[float]:
    """Points of accuracy, of the seeds that have both."""
    both = [runs for runs in results.values() if slug in runs and reference in runs]
    return [100 * (runs[slug]["accuracy"] - runs[reference]["accuracy"]) for runs in both]


def row(results: Results, name: str, slug: str, reference: str) -> str:
    runs = [runs[slug] for runs in results.values() if slug in runs]
    first = slug == reference
    difference = interval(differences(results, slug, reference))
    degenerated = sum(run.get("degenerated", 0) for run in runs)
    cells = [
        name,
        interval([100 * run["accuracy"] for run in runs]),
        "" if first else difference if difference.startswith("-") else f"+{difference}",
        interval([run["kl"] for run in runs], 3),
        f"{fmean(run['entropy'] for run in runs):.3f}",
        f"{fmean(run['truncated'] for run in runs):.1%}",
        f"{fmean(run.get('repeating', 0) for run in runs):.1%}",
        f"{degenerated} of {len(runs)}",
    ]
    return f"| {' | '.join(cells)} |"


def table(results: Results, question: Question) -> str:
    lines = [f"**{question.title}**", "", HEADER]
    for group in question.groups:
        done = [arm for arm in group if any(arm.slug in runs for runs in results.values())]
        lines += [row(results, arm.name, arm.slug, group[0].slug) for arm in done]
    return "\n".join(lines)


def starts(results: Results) -> str:
    names = sorted({name for runs in results.values() for name in runs if name.startswith("before-")})
    lines = ["**Before**", "", HEADER]
    lines += [row(results, f"student at {name.removeprefix('before-')} %", name, name) for name in names]
    return "\n".join(lines)


def courses(place: Path, arms: Iterable[Arm], output: Path) -> None:
    """Agreement with the teacher and entropy on the student's own fresh answers, over the steps; means of seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for arm in arms:
        logs = [_log(file) for file in sorted(place.glob(f"seed-*/{arm.slug}/checkpoint/{LOG}"))]
        for axis, measure in zip(axes, ("top1_agreement", "student_entropy"), strict=True):
            means = [fmean(step[measure] for step in steps) for steps in zip(*logs, strict=False)]
            axis.plot(range(1, len(means) + 1), means, label=arm.name, linewidth=1.2)
    axes[0].set(xlabel="step", ylabel="share of tokens", title="Same best token as the teacher, own answers")
    axes[1].set(xlabel="step", ylabel="nats a token", title="Student's entropy, own answers")
    axes[0].legend(fontsize=7)
    figure.savefig(output)
    plt.close(figure)


def rates(results: Results, output: Path) -> None:
    """Accuracy over the learning rate, with 95 % intervals."""
    (question,) = [question for question in QUESTIONS if "learning rate" in question.title]
    figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    for arms in zip(*question.groups, strict=True):
        points = [(arm.rate, _accuracies(results, arm)) for arm in arms if _accuracies(results, arm)]
        means = [fmean(values) for _, values in points]
        halves = [float(interval(values, 6).partition("±")[2] or 0) for _, values in points]
        axis.errorbar([rate for rate, _ in points], means, halves, label=arms[0].name.partition(": ")[2], capsize=3)
    axis.set(xscale="log", xlabel="learning rate", ylabel="accuracy, %")
    axis.legend(fontsize=7)
    figure.savefig(output)
    plt.close(figure)


def _accuracies(results: Results, arm: Arm) -> list[float]:
    return [100 * runs[arm.slug]["accuracy"] for runs in results.values() if arm.slug in runs]


def _log(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    place, output = map(Path, sys.argv[1:3])
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "study"  # the same results draw the same bytes
    output.mkdir(parents=True, exist_ok=True)
    results = gather(place)
    tables = [starts(results), *(table(results, question) for question in QUESTIONS)]
    (output / "tables.md").write_text("\n\n".join(tables) + "\n")
    courses(place, MAIN, output / "courses.svg")
    rates(results, output / "rates.svg")


if __name__ == "__main__":
    main()
