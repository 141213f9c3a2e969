"""tsdkd prune"""

from pathlib import Path
from typing import Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.stages.config.prune import PruneConfig


def command(
    output: Annotated[Path, typer.Option(help="Where the smaller model goes.", rich_help_panel=options.DATA)],
    drop: Annotated[int, options.count("Layers to remove.", options.METHOD)] = PruneConfig.drop,
    teacher: options.Teacher = None,
    prompts: options.Prompts = None,
    column: options.Column = None,
    limit: Annotated[int, options.count("Prompts the choice is made on.", options.METHOD)] = PruneConfig.limit,
    max_tokens: Annotated[int, options.count("Tokens of each.", options.METHOD)] = PruneConfig.max_tokens,
    dtype: options.DTypeName = PruneConfig.dtype,
    overwrite: options.Overwrite = False,
) -> None:
    """Teacher -> student with fewer layers, for a family without a small sibling."""
    from tsdkd.stages.prune import prune

    config = PruneConfig(drop=drop, limit=limit, max_tokens=max_tokens, column=column, dtype=dtype)
    artifact = prune(
        defaults.teacher(teacher), prompts or defaults.PROMPTS, output, config, ConsoleObserver(), overwrite
    )
    found = artifact.manifest.summary
    steps = zip(found["dropped_layers"], found["kl_after_each"], strict=True)
    show_pairs(
        "student",
        [
            ("at", str(artifact.path)),
            ("layers left", str(found["layers"])),
            *[(f"without layer {layer}", f"KL to the teacher {kl:.3f} nats a token") for layer, kl in steps],
        ],
    )
    show_next(f"tsdkd generate --student {artifact.path}")
