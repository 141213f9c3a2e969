"""tsdkd artifact: look at the artifacts that stages write, and share them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text
from rich.tree import Tree

import tsdkd.stages  # noqa: F401 - adds the check of recorded configurations
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs, show_text, show_tree
from tsdkd.printable import escape_controls

if TYPE_CHECKING:
    from tsdkd.artifacts.manifest import Manifest, Parent

app = typer.Typer(no_args_is_help=True, help="Look at artifacts, and share them: show, verify, lineage, push, pull.")
MAX_EXPANDED = 200
"""The largest number of artifacts in a lineage."""
STORE = (
    "hf://datasets/USER/NAME/PATH, hf://USER/NAME for a checkpoint, s3://BUCKET/PATH, gs://BUCKET/PATH, file:///PATH, "
    "or another URL of fsspec"
)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of an artifact.", show_default=False)]


@app.command()
def show(
    path: Directory,
    config: Annotated[
        bool, typer.Option("--config", help="Print only its options, as YAML for the --config of its stage.")
    ] = False,
) -> None:
    """Show the contents, models and parents of an artifact."""
    from tsdkd.artifacts.manifest import flatten, load_manifest

    manifest = load_manifest(path)
    if config:
        from tsdkd.stages.config.recorded import config_text

        show_text(config_text(path, manifest).rstrip())
        return
    show_pairs(
        f"{manifest.kind}, {manifest.state}",
        [
            ("fingerprint", manifest.fingerprint),
            ("written by", f"tsdkd {manifest.tsdkd}, {manifest.engine}, {_format_pairs(manifest.libraries)}"),
            ("seed", str(manifest.seed)),
            *([("chat template day", manifest.day)] if manifest.day else []),
            ("config", _format_pairs(flatten(manifest.config))),
            *[(model.role, f"{model.name} (weights {model.weights[:12]})") for model in manifest.models],
            *[
                ("made from", f"{parent.kind} {parent.fingerprint[:12]} at {_parent_path(path, parent)}")
                for parent in manifest.parents
            ],
            ("files", _format_files(manifest)),
            *[(name, _format_value(value)) for name, value in flatten(manifest.summary).items()],
        ],
    )


@app.command()
def verify(path: Directory) -> None:
    """Check that files, columns and parents are unchanged."""
    from tsdkd.artifacts.reader import verify_artifact

    manifest, outside = verify_artifact(path)
    show_text(
        f"{path}: {manifest.kind} unchanged, {len(manifest.parts)} files, fingerprint {manifest.fingerprint[:12]}"
    )
    for parent in outside:
        show_text(f"{parent.kind} at {_parent_path(path, parent)}: outside the run, not checked")


@app.command()
def push(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory of an artifact.", show_default=False)],
    destination: Annotated[str, typer.Argument(metavar="DEST", help=f"Where it goes: {STORE}.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another artifact at DEST, and files with the names of parts.")
    ] = False,
) -> None:
    """Send an artifact to the hub, a bucket or another directory, with hashes checked on both sides.

    An interrupted push continues with the same command. Credentials come from the environment.
    """
    from tsdkd.stages.share.stage import push as push_artifact

    url = push_artifact(source, destination, ConsoleObserver(), overwrite)
    show_text(f"{source} is at {url}")
    show_next(shlex.join(["tsdkd", "artifact", "pull", url, "DIR"]))


@app.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"Where it is: {STORE}; NAME may be NAME@REVISION.")],
    output: Annotated[Path, typer.Argument(metavar="DEST", help="Directory of the artifact.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another artifact at DEST when the new one is complete.")
    ] = False,
) -> None:
    """Fetch an artifact from the hub, a bucket or another directory; its fingerprint stays the same.

    An interrupted pull continues with the same command. Credentials come from the environment.
    """
    from tsdkd.stages.share.stage import pull as pull_artifact

    artifact = pull_artifact(source, output, ConsoleObserver(), overwrite)
    show_text(f"{output}: {artifact.manifest.kind}, fingerprint {artifact.fingerprint[:12]}")


@app.command()
def lineage(path: Directory) -> None:
    """Show the tree of everything that an artifact was made from."""
    from tsdkd.artifacts.manifest import load_manifest
    from tsdkd.artifacts.reader import run_of

    manifest = load_manifest(path)
    tree = Tree(_label(manifest.kind, manifest.fingerprint, str(path)))
    _add_sources(tree, path, manifest, run_of(path), {path.resolve()}, [])
    show_tree(tree)


def _add_sources(tree: Tree, path: Path, manifest: Manifest, run: Path, above: set[Path], expanded: list[Path]) -> None:
    """Add parents and models; those in `above` are not expanded, since a later round can replace them.

    `run`: files outside are not hashed. `expanded`: all artifacts in the tree so far. Raises ArtifactError for more
    than MAX_EXPANDED.
    """
    from tsdkd.artifacts.files import MANIFEST_FILE
    from tsdkd.artifacts.manifest import HUB_DATASET, MADE_BY, load_manifest
    from tsdkd.artifacts.reader import check_parents
    from tsdkd.errors import ArtifactError

    expanded.append(path)
    if len(expanded) > MAX_EXPANDED:
        raise ArtifactError(
            f"{expanded[0]} is made from more than {MAX_EXPANDED} artifacts.", "Show the lineage of one of its parents."
        )
    for parent, exists, same in check_parents(path, manifest, run):
        source = path / parent.path
        unchecked = "" if parent.kind == HUB_DATASET else " (outside the run, not checked)"
        changed = " (changed since)" if exists else " (missing)"
        state = unchecked if same is None else "" if same else changed
        branch = tree.add(_label(parent.kind, parent.fingerprint, _parent_path(path, parent), state))
        if same and parent.kind in MADE_BY and source.resolve() not in above:
            _add_sources(branch, source, load_manifest(source), run, above | {source.resolve()}, expanded)
    for model in manifest.models:
        branch = tree.add(_label(model.role, model.weights, model.name))
        source = Path(model.name)
        if (source / MANIFEST_FILE).is_file() and source.resolve() not in above:
            _add_sources(branch, source, load_manifest(source), run, above | {source.resolve()}, expanded)


def _label(kind: str, fingerprint: str, name: str, state: str = "") -> Text:
    """One line of a tree; `state`: how the file differs from the record."""
    parts = (f"{kind} {fingerprint[:12]}", state, f" {name}")
    kind_, state_, name_ = (escape_controls(part, one_line=True) for part in parts)
    return Text.assemble(kind_, (state_, "red"), name_)


def _parent_path(path: Path, parent: Parent) -> str:
    """The name of a hub dataset; else the path, relative to the working directory if it lies below."""
    from tsdkd.artifacts.manifest import HUB_DATASET

    if parent.kind == HUB_DATASET:
        return parent.path
    absolute = (path / parent.path).resolve()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def _format_files(manifest: Manifest) -> str:
    rows = f"{manifest.rows:,} rows, " if any(part.rows is not None for part in manifest.parts) else ""
    return f"{len(manifest.parts)}, {rows}{sum(part.bytes for part in manifest.parts) / 1e6:,.1f} MB"


def _format_pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _format_value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format_value, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
