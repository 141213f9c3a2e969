"""Tables, rows and plots of the complete arms: python -m recipes.study.report DIRECTORY OUTPUT

Seeds are replicates: mean and 95 % interval by Student's t. Differences are paired by seed, from the same student. The
report keeps the rows of OUTPUT/results.jsonl whose seeds are not in DIRECTORY, so machines can divide the seeds.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import matplotlib.pyplot as plt

from recipes.experiment.arms import seed_directories
from recipes.experiment.measures import ROWS
from recipes.experiment.settings import SETTINGS_FILE
from recipes.experiment.statistics import half_interval
from recipes.experiment.tables import EXPLANATION, MEANINGLESS, Row, format_table
from recipes.study.questions import QUESTIONS, RATES, TERMS_OF_SUMS, Question, StudyArm, every_arm
from recipes.study.results import Results, arm_of_task, read_results, student_of_task
from tsdkd.stages.metrics.log import METRICS_FILE, is_step, read_log


def format_before(results: Results) -> str:
    """The students before training."""
    rows = []
    for task, start in dict.fromkeys((arm.task, arm.start) for arm in every_arm()):
        if runs := results.of(student_of_task(task, start)):
            rows.append(Row(f"{task}{f' from {start} %' if start else ''}", runs, runs))
    return f"**Before training**\n\n{format_table(rows)}"


def format_question(results: Results, question: Question) -> str:
    """The table of a question; "" without a complete arm."""
    rows = []
    for group in question.groups:
        reference = results.of(arm_of_task(group[0]))
        for arm in group:
            _, trained = arm_of_task(arm)
            if runs := results.of((arm.task, trained)):
                rows.append(Row(arm.name, runs, reference, f"{trained.rate:g}"))
    return f"**{question.title}**\n\n{format_table(rows)}" if rows else ""


def format_tables(results: Results, note: str = "") -> str:
    """All tables in Markdown, after a note."""
    tables = [format_before(results), *(format_question(results, question) for question in QUESTIONS)]
    return "\n\n".join(filter(None, [note, EXPLANATION, *tables])) + "\n"


def draw_training(directory: Path, arms: Iterable[StudyArm], output: Path) -> None:
    """Top-1 agreement and student entropy on the responses of each step, means over the seeds in the directory.

    Without a log, a plot that exists is kept.
    """
    logs = {arm.name: [*map(_read_steps, _logs(directory, arm))] for arm in arms}
    if not any(logs.values()):
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, measure in zip(axes, ("top1_agreement", "student_entropy"), strict=True):
        for name, seeds in logs.items():
            means = [fmean(step[measure] for step in steps) for steps in zip(*seeds, strict=False)]
            axis.plot(range(1, len(means) + 1), means, label=name, linewidth=1)
    axes[0].set(xlabel="step", ylabel="fraction of tokens", title="Top-1 agreement with the teacher")
    axes[1].set(xlabel="step", ylabel="nats per token", title="Student entropy")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(output, metadata={"Date": None})
    plt.close(figure)


def _logs(directory: Path, arm: StudyArm) -> list[Path]:
    task, trained = arm_of_task(arm)
    logs = [seed / trained.directory.name / "checkpoint" / METRICS_FILE for seed in seed_directories(directory / task)]
    return [log for log in logs if log.is_file()]


def _read_steps(log: Path) -> list[dict[str, float]]:
    return [entry for entry in read_log(log) if is_step(entry)]


def draw_rates(results: Results, output: Path) -> None:
    """Accuracy by learning rate, with 95 % intervals; a panel for each task that has run, no figure without one."""
    lines_of = {question.groups[0][0].task: _accuracies(results, question) for question in RATES}
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


def _accuracies(results: Results, question: Question) -> dict[str, dict[float, list[float]]]:
    """The accuracies in percent of all seeds, by entry and learning rate."""
    lines: dict[str, dict[float, list[float]]] = {}
    for arm in (arm for group in question.groups for arm in group):
        task, trained = arm_of_task(arm)
        if values := Row("", results.of((task, trained)), {}).values("accuracy"):
            lines.setdefault(arm.entry.name, {})[trained.rate] = [100 * value for value in values]
    return lines


def main() -> None:
    directory, output = map(Path, sys.argv[1:3])
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "study"  # the same results give the same bytes
    output.mkdir(parents=True, exist_ok=True)
    results = read_results(directory, output / ROWS)
    scales = {json.loads(file.read_text())["scale"] for file in directory.glob(f"*/{SETTINGS_FILE}")}
    (output / "tables.md").write_text(format_tables(results, MEANINGLESS if "tiny" in scales else ""))
    (output / ROWS).write_text("".join(json.dumps(row) + "\n" for row in results.rows()))
    draw_training(directory, TERMS_OF_SUMS, output / "training.svg")
    draw_rates(results, output / "rates.svg")


if __name__ == "__main__":
    main()
