"""Tables and plots of the complete arms: python -m recipes.study.report DIRECTORY OUTPUT

Seeds are replicates: mean and 95 % interval by Student's t. Differences are paired by seed, from the same student.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import matplotlib.pyplot as plt

from recipes.experiment.measures import RESULT
from recipes.experiment.statistics import Runs, format_interval, half_interval, paired_differences
from recipes.study.arms import MAIN, QUESTIONS, RATES, Arm
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.stages.metrics.log import METRICS_FILE

COLUMNS = [
    "",
    "accuracy %",
    "difference, points",
    "KL",
    "difference",
    "entropy",
    "tokens",
    "truncated",
    "repeating",
    "degenerated",
]


def read_arms(directory: Path) -> dict[str, Runs]:
    """The measures of every arm, by the name of its directory."""
    runs_by_name: dict[str, Runs] = defaultdict(dict)
    for file in sorted(directory.glob(f"seed-*/*/{RESULT}")):
        runs_by_name[file.parent.name][int(file.parts[-3].removeprefix("seed-"))] = json.loads(file.read_text())
    return runs_by_name


def read_pair(directory: Path) -> dict[str, Runs]:
    """The results of `tsdkd eval` on the embedded pair, by method."""
    runs_by_name: dict[str, Runs] = defaultdict(dict)
    for path in sorted(directory.glob("pair/results/[!.]*/")):
        manifest, (name, _, seed) = load_manifest(path), path.name.rpartition("-")
        if manifest.state != "complete":
            continue
        summary = manifest.summary
        runs_by_name[name or seed][int(seed) if name else 0] = summary["held_out"] | {
            "accuracy": summary["embedded"]["value"]
        }
    return runs_by_name


def format_table(title: str, rows: Iterable[tuple[str, Runs, Runs]]) -> str:
    """A Markdown table; rows: a name, its measures, and the measures of its reference."""
    lines = [f"**{title}**", "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    return "\n".join([*lines, *(_line(_cells(*row)) for row in rows if row[1])])


def _cells(name: str, runs: Runs, reference: Runs) -> list[str]:
    measured = [name]
    for measure, scale, digits in (("accuracy", 100, 1), ("kl", 1, 3)):
        measured.append(format_interval([scale * run[measure] for run in runs.values()], digits))
        paired = [scale * value for value in paired_differences(runs, reference, measure)]
        measured.append(
            "" if runs is reference or not paired else f"{'+' * (fmean(paired) > 0)}{format_interval(paired, digits)}"
        )
    fractions = [_mean(runs, measure, ".1%") for measure in ("truncated", "repeating")]
    trained = [run["degenerated"] for run in runs.values() if "degenerated" in run]
    degenerated = f"{sum(trained)} of {len(trained)}" if trained else ""
    return [*measured, _mean(runs, "entropy", ".3f"), _mean(runs, "length", ".1f"), *fractions, degenerated]


def _mean(runs: Runs, measure: str, format_: str) -> str:
    known = [run[measure] for run in runs.values() if measure in run]
    return format(fmean(known), format_) if known else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_tables(directory: Path) -> str:
    """All tables in Markdown: the students before training, each question, and the embedded pair."""
    runs_by_name = read_arms(directory)
    before = sorted(name for name in runs_by_name if name.startswith("before-"))
    written = [
        format_table(
            "Before", [(f"student at {n.removeprefix('before-')} %", runs_by_name[n], runs_by_name[n]) for n in before]
        )
    ]
    for question in QUESTIONS:
        rows = [
            (arm.name, runs_by_name[arm.slug], runs_by_name[group[0].slug])
            for group in question.groups
            for arm in group
        ]
        written.append(format_table(question.title, rows))
    if pair := read_pair(directory):
        written.append(
            format_table("On the embedded pair", [(name, runs, pair.get("gkd", {})) for name, runs in pair.items()])
        )
    return "\n\n".join(written) + "\n"


def draw_training(directory: Path, arms: Iterable[Arm], output: Path) -> None:
    """Top-1 agreement and student entropy on the responses of each step; means over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for arm in arms:
        files = sorted(directory.glob(f"seed-*/{arm.slug}/checkpoint/{METRICS_FILE}"))
        logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        for axis, measure in zip(axes, ("top1_agreement", "student_entropy"), strict=True):
            means = [fmean(entry[measure] for entry in step) for step in zip(*logs, strict=False)]
            axis.plot(range(1, len(means) + 1), means, label=arm.name, linewidth=1)
    axes[0].set(xlabel="step", ylabel="fraction of tokens", title="Top-1 agreement with the teacher")
    axes[1].set(xlabel="step", ylabel="nats per token", title="Student entropy")
    axes[0].legend(fontsize=7)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def draw_rates(runs_by_name: dict[str, Runs], output: Path) -> None:
    """Accuracy by learning rate, with 95 % intervals."""
    figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    for arms in zip(*RATES.groups, strict=True):
        points = {arm.rate: [100 * run["accuracy"] for run in runs_by_name[arm.slug].values()] for arm in arms}
        points = {rate: values for rate, values in points.items() if values}
        name = arms[0].name.partition(": ")[2]
        axis.errorbar(
            list(points), [*map(fmean, points.values())], [*map(half_interval, points.values())], label=name, capsize=3
        )
    tried = [group[0].rate for group in RATES.groups]
    axis.set(xscale="log", xlabel="learning rate", ylabel="accuracy, %", ylim=(0, 100))
    axis.set_xticks(tried, [f"{rate:g}" for rate in tried])
    axis.minorticks_off()
    axis.legend(fontsize=7)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    directory, output = map(Path, sys.argv[1:3])
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "study"  # the same results give the same bytes
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text(format_tables(directory))
    draw_training(directory, MAIN, output / "training.svg")
    draw_rates(read_arms(directory), output / "rates.svg")


if __name__ == "__main__":
    main()
