"""tsdkd prune"""

from pathlib import Path
from typing import Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.stages.config.prune import PruneConfig


@options.configured(PruneConfig)
def command(
    config: PruneConfig,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the smaller model.", rich_help_panel=options.COMMON)
    ],
    teacher: options.FirstTeacher = None,
    prompts: options.Prompts = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Make a student from a teacher by removing layers, for a family without a small model: teacher -> student."""
    from tsdkd.stages.prune import prune

    data = prompts or defaults.PROMPTS
    artifact = prune(defaults.teacher(teacher), data, output, config, ConsoleObserver(), overwrite)
    summary = artifact.manifest.summary
    removed = zip(summary["dropped_layers"], summary["kl_after_each"], strict=True)
    show_pairs(
        "student",
        [
            ("path", str(artifact.path)),
            ("layers", str(summary["layers"])),
            *[(f"without layer {layer}", f"KL to the teacher {kl:.3f} nats a token") for layer, kl in removed],
        ],
    )
    show_next(f"tsdkd generate{options.path_option('--student', artifact.path)}")
