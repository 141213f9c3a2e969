"""Tables, rows and plots of the complete arms: python -m recipes.study.report DIRECTORY OUTPUT

Seeds are replicates: mean and 95 % interval by Student's t. Differences are paired by seed, from the same student.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import matplotlib.pyplot as plt

from recipes.experiment.arms import Arm, result_row
from recipes.experiment.measures import RESULT, ROWS
from recipes.experiment.settings import SETTINGS_FILE, Settings
from recipes.experiment.statistics import Runs, half_interval
from recipes.experiment.tables import EXPLANATION, MEANINGLESS, Row, format_table
from recipes.experiment.tasks import find_task
from recipes.study.questions import QUESTIONS, RATES, TERMS_OF_SUMS, Question, StudyArm, every_arm
from tsdkd.stages.metrics.log import METRICS_FILE, is_step, read_log


def read_runs(directory: Path, task: str, arm: Arm) -> Runs:
    """The measures of an arm for every seed; the arm's own seed is ignored."""
    found = sorted((directory / task).glob(f"seed-*/{arm.directory.name}/{RESULT}"))
    return {int(file.parts[-3].removeprefix("seed-")): json.loads(file.read_text()) for file in found}


def _arm(arm: StudyArm) -> Arm:
    return arm.of_seed(1, find_task(Settings(arm.task)).conditions.rate)


def read_rows(directory: Path) -> list[dict[str, object]]:
    """A row per complete arm, in the order of the questions; the students before training come first."""
    chosen = every_arm()
    students = dict.fromkeys((arm.task, Arm(1, "test", start=arm.start)) for arm in chosen)
    return [
        result_row(task, replace(arm, seed=seed), measures)
        for task, arm in [*students, *((arm.task, _arm(arm)) for arm in chosen)]
        for seed, measures in read_runs(directory, task, arm).items()
    ]


def format_before(directory: Path) -> str:
    """The students before training."""
    rows = []
    for task, start in dict.fromkeys((arm.task, arm.start) for arm in every_arm()):
        if runs := read_runs(directory, task, Arm(1, "test", start=start)):
            rows.append(Row(f"{task}{f' from {start} %' if start else ''}", runs, runs))
    return f"**Before training**\n\n{format_table(rows)}"


def format_question(directory: Path, question: Question) -> str:
    """The table of a question; "" without a complete arm."""
    rows = []
    for group in question.groups:
        arms = [(arm, read_runs(directory, arm.task, _arm(arm))) for arm in group]
        reference = arms[0][1]
        rows += [Row(arm.name, runs, reference, f"{_arm(arm).rate:g}") for arm, runs in arms if runs]
    return f"**{question.title}**\n\n{format_table(rows)}" if rows else ""


def format_tables(directory: Path) -> str:
    """All tables in Markdown."""
    tables = [format_before(directory), *(format_question(directory, question) for question in QUESTIONS)]
    scales = {json.loads(file.read_text())["scale"] for file in directory.glob(f"*/{SETTINGS_FILE}")}
    note = MEANINGLESS if "tiny" in scales else ""
    return "\n\n".join(filter(None, [note, EXPLANATION, *tables])) + "\n"


def draw_training(directory: Path, arms: Iterable[StudyArm], output: Path) -> None:
    """Top-1 agreement and student entropy on the responses of each step; means over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for arm in arms:
        files = sorted((directory / arm.task).glob(f"seed-*/{_arm(arm).directory.name}/checkpoint/{METRICS_FILE}"))
        logs = [[entry for entry in read_log(file) if is_step(entry)] for file in files]
        for axis, measure in zip(axes, ("top1_agreement", "student_entropy"), strict=True):
            means = [fmean(entry[measure] for entry in step) for step in zip(*logs, strict=False)]
            axis.plot(range(1, len(means) + 1), means, label=arm.name, linewidth=1)
    axes[0].set(xlabel="step", ylabel="fraction of tokens", title="Top-1 agreement with the teacher")
    axes[1].set(xlabel="step", ylabel="nats per token", title="Student entropy")
    axes[0].legend(fontsize=7)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def draw_rates(directory: Path, output: Path) -> None:
    """Accuracy by learning rate, with 95 % intervals; a panel for each task that has run, no figure without one."""
    lines_of = {question.groups[0][0].task: _accuracies(directory, question) for question in RATES}
    panels = {task: lines for task, lines in lines_of.items() if lines}
    output.unlink(missing_ok=True)  # of an earlier report
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, (task, lines) in zip(axes[0], panels.items(), strict=True):
        for name, values in lines.items():
            means, errors = [*map(fmean, values.values())], [*map(half_interval, values.values())]
            axis.errorbar([*values], means, errors, label=name, capsize=3)
        rates = sorted({rate for values in lines.values() for rate in values})
        axis.set(xscale="log", xlabel="learning rate", ylabel="accuracy, %", title=task)
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def _accuracies(directory: Path, question: Question) -> dict[str, dict[float, list[float]]]:
    """The accuracies in percent of all seeds, by entry and learning rate."""
    lines: dict[str, dict[float, list[float]]] = {}
    for arm in (arm for group in question.groups for arm in group):
        found = Row("", read_runs(directory, arm.task, _arm(arm)), {}).values("accuracy")
        if found:
            lines.setdefault(arm.entry.name, {})[_arm(arm).rate] = [100 * value for value in found]
    return lines


def main() -> None:
    directory, output = map(Path, sys.argv[1:3])
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "study"  # the same results give the same bytes
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text(format_tables(directory))
    (output / ROWS).write_text("".join(json.dumps(row) + "\n" for row in read_rows(directory)))
    draw_training(directory, TERMS_OF_SUMS, output / "training.svg")
    draw_rates(directory, output / "rates.svg")


if __name__ == "__main__":
    main()
