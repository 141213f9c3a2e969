"""tsdkd doctor"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, out, show_text
from tsdkd.cli.options import option_values
from tsdkd.cli.plan import format_time
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.doctor import DoctorConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.groups import DATA
from tsdkd.stages.config.option import build
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig

if TYPE_CHECKING:
    from tsdkd.stages.doctor.findings import Finding, Findings
    from tsdkd.stages.plan.estimates import Estimate

STOPPED = 2
"""The exit code when a finding stops."""
MEMORY_REMEDIES = {
    "generate": "vLLM takes --memory-fraction of the machine, however small the model is: give generate a smaller one, "
    "or with transformers a smaller --batch-size.",
    "score": "Give score smaller --batch-tokens.",
    "train": "Give train --lora or --gradient-checkpointing.",
}
"""By the command that needs most."""
STYLES = {"ok": "green", "look": "yellow", "stop": "red"}


def read_doctor_config(context: typer.Context) -> DoctorConfig:
    """Raises InputError for values out of range."""
    values = option_values(context, DoctorConfig)
    nested = {
        "sampling": build(GenerateConfig, values, "sampling."),
        "objective": build(TSDKDConfig, values, "objective."),
    }
    config: DoctorConfig = build(DoctorConfig, values | nested)
    return config


RecordedRun = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Check the rollouts and scores of this run for --student, in place of a pair and prompts.",
        show_default="none",
        rich_help_panel=options.COMMON,
    ),
]


@options.configured(DoctorConfig, read_doctor_config)
def command(
    config: DoctorConfig,
    run: RecordedRun = None,
    student: options.FirstStudent = None,
    teacher: options.FirstTeacher = None,
    prompts: options.Prompts = None,
    benchmarks: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Local copies of benchmarks, as for eval --data: find prompts that contain their questions.",
            show_default="none",
            rich_help_panel=DATA,
        ),
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print a JSON list of the findings.", rich_help_panel=options.COMMON)
    ] = False,
    seed: options.Seed = 0,
) -> None:
    """Check a student, a teacher and prompts before a run, or recorded scores: one finding a line, ok, look or stop.

    Writes nothing. Exit code 2 if a finding stops.
    """
    if run is None:
        findings = _diagnose_pair(config, student, teacher, prompts, benchmarks, seed)
    else:
        findings = _diagnose_run(
            config, run, student, {"teacher": teacher, "prompts": prompts, "benchmarks": benchmarks}
        )
    if json_:
        show_text(json.dumps([asdict(finding) for finding in findings.all], indent=1))  # ASCII suits every terminal
    else:
        _show(findings)
    if findings.stops:
        raise typer.Exit(STOPPED)


def _diagnose_pair(
    config: DoctorConfig,
    student: str | None,
    teacher: str | None,
    prompts: Path | None,
    benchmarks: Path | None,
    seed: int,
) -> Findings:
    from tsdkd.stages.doctor.stage import diagnose

    names, data = (defaults.student(student), defaults.teacher(teacher)), prompts or defaults.PROMPTS
    findings = diagnose(*names, data, config, benchmarks, seed, ConsoleObserver())
    if not findings.stops:
        _add_plan(findings, *names, data, config)
    return findings


def _diagnose_run(config: DoctorConfig, run: Path, student: str | None, others: Mapping[str, object]) -> Findings:
    """Raises InputError for options of a pair."""
    if given := [f"--{name}" for name, value in others.items() if value is not None]:
        raise InputError(
            f"With --run, doctor checks recorded rollouts and scores, and does not read {' and '.join(given)}.",
            "Leave one of them out.",
        )

    from tsdkd.stages.doctor.recorded_run import diagnose_run

    return diagnose_run(run, defaults.model(student) if student else None, config, ConsoleObserver())


def _add_plan(findings: Findings, student: str, teacher: str, prompts: Path, config: DoctorConfig) -> None:
    """Add disk, memory and time of generate, score and train with their defaults, as `tsdkd plan` estimates them."""
    if estimates := findings.attempt("plan", lambda: _estimate(findings, student, teacher, prompts, config)):
        findings.all += _plan_findings(estimates)


def _estimate(
    findings: Findings, student: str, teacher: str, prompts: Path, config: DoctorConfig
) -> dict[str, Estimate]:
    """By command. Raises InputError as the commands would."""
    from tsdkd.stages.data.prompts import Prompts
    from tsdkd.stages.plan.chain import Chain
    from tsdkd.stages.plan.rates import measure_rates
    from tsdkd.stages.plan.stage import Planner

    sampling = replace(config.sampling, chat=config.chat)
    count = next(finding.values["prompts"] for finding in findings.all if finding.name == "prompts")
    planner, run = Planner(Chain({}, count), measure_rates()), options.DEFAULT_RUN
    source = Prompts(prompts, sampling.column, sampling.limit, sampling.system, sampling.config_name, sampling.split)
    models, rollouts, scores = {"student": student, "teacher": teacher}, run / "rollouts", run / "scores"
    score = ScoreConfig(k=config.objective.k, dtype=sampling.dtype)
    train = TrainConfig(objective=config.objective, learning_rate=config.learning_rate)
    rows = [
        planner.generate(source, {"student": student}, rollouts, sampling, overwrite=True),
        planner.score(rollouts, models, scores, score, overwrite=True),
        planner.train(rollouts, scores, None, models, run / "checkpoint", train, overwrite=True),
    ]
    return {row.stage: row.estimate for row in rows if row.estimate}


def _plan_findings(estimates: dict[str, Estimate]) -> list[Finding]:
    from tsdkd.stages.data.score_cost import format_bytes
    from tsdkd.stages.doctor.findings import finding
    from tsdkd.stages.models.device import available_memory, default_device

    free, memory = shutil.disk_usage(Path.cwd()).free, available_memory(default_device())
    disk = sum(estimate.disk + estimate.temporary_disk for estimate in estimates.values())
    largest = max(estimates, key=lambda stage: estimates[stage].memory)
    needed, seconds = estimates[largest].memory, sum(estimate.seconds for estimate in estimates.values())
    remedy = "tsdkd plan takes the commands that you mean to run, with their options."
    by_stage = ", ".join(f"{stage} {format_time(estimate.seconds)}" for stage, estimate in estimates.items())
    return [
        finding(
            "disk",
            f"At most {format_bytes(disk)} for rollouts, scores and checkpoint; {format_bytes(free)} are free here.",
            "This may not fit." * (disk > free),
            f"Use --signal hidden8 or topk in score, or another --run. {remedy}",
            values={"needed": disk, "free": free},
        ),
        finding(
            "memory",
            f"{format_bytes(needed)} for {largest}; {format_bytes(memory)} are available.",
            "This may not fit." * (needed > memory),
            f"{MEMORY_REMEDIES[largest]} {remedy}",
            values={"needed": needed, "available": memory, "stage": largest},
        ),
        finding(
            "time",
            f"At most {format_time(seconds)} with the defaults of train ({by_stage}).",
            values={f"{stage}_seconds": estimate.seconds for stage, estimate in estimates.items()},
        ),
    ]


def _show(findings: Findings) -> None:
    width = max(len(finding.name) for finding in findings.all)
    for finding in findings.all:
        name = f"{finding.name.replace('_', ' '):<{width}}"
        line = Text.assemble(
            (f"{finding.status:<4}", STYLES[finding.status]), "  ", (name, "bold"), "  ", finding.reason
        )
        if finding.remedy:
            line.append(f" -> {finding.remedy}", "dim")
        out.print(line, soft_wrap=True)
    counts = {status: sum(finding.status == status for finding in findings.all) for status in STYLES}
    show_text(", ".join(f"{count} {status}" for status, count in counts.items()))
