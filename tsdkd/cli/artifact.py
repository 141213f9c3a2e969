"""tsdkd artifact: look at what lies between stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.tree import Tree

from tsdkd.cli.console import out, show_pairs, show_tree

if TYPE_CHECKING:
    from tsdkd.artifacts.manifest import Manifest, Parent

app = typer.Typer(no_args_is_help=True, help="Look at artifacts: show, verify, lineage.")
Place = Annotated[Path, typer.Argument(help="An artifact's directory.", show_default=False)]


@app.command()
def show(path: Place) -> None:
    """What an artifact is and what it was made from."""
    from tsdkd.artifacts.manifest import flatten, load_manifest

    manifest = load_manifest(path)
    show_pairs(
        f"{manifest.kind}, {manifest.state}",
        [
            ("fingerprint", manifest.fingerprint),
            ("written by", f"tsdkd {manifest.tsdkd}, {manifest.engine}, {_pairs(manifest.libraries)}"),
            ("seed", str(manifest.seed)),
            ("config", _pairs(flatten(manifest.config))),
            *[(model.role, f"{model.name} (weights {model.weights[:12]})") for model in manifest.models],
            *[
                ("made from", f"{parent.kind} {parent.fingerprint[:12]} at {_place(path, parent)}")
                for parent in manifest.parents
            ],
            ("files", _files(manifest)),
            *[(name, _shown(value)) for name, value in flatten(manifest.summary).items()],
        ],
    )


@app.command("verify")
def verify_(path: Place) -> None:
    """Check every file's hash, the columns, and that the parents are unchanged."""
    from tsdkd.artifacts.reader import verify_artifact

    manifest = verify_artifact(path)
    fingerprint = manifest.fingerprint[:12]
    out.print(
        f"{path}: {manifest.kind} in order, {len(manifest.parts)} files, fingerprint {fingerprint}", soft_wrap=True
    )


@app.command()
def lineage(path: Place) -> None:
    """The tree of everything an artifact was made from."""
    from tsdkd.artifacts.manifest import load_manifest

    manifest = load_manifest(path)
    tree = Tree(_name(path, manifest))
    _grow(tree, path, manifest, {path.resolve()})
    show_tree(tree)


def _grow(tree: Tree, path: Path, manifest: Manifest, above: set[Path]) -> None:
    """Draw parents and models; what stands `above` is not drawn again: a later round may have replaced it."""
    from tsdkd.artifacts.manifest import MADE_BY, MANIFEST_FILE, load_manifest
    from tsdkd.artifacts.reader import check_parents

    for parent, there, same in check_parents(path, manifest):
        place = path / parent.path
        state = "" if same else " [red](changed since)[/red]" if there else " [red](not there any more)[/red]"
        branch = tree.add(f"{parent.kind} {parent.fingerprint[:12]}{state} {escape(_place(path, parent))}")
        if same and parent.kind in MADE_BY and place.resolve() not in above:
            _grow(branch, place, load_manifest(place), above | {place.resolve()})
    for model in manifest.models:
        branch = tree.add(f"{model.role} {model.weights[:12]} {escape(model.name)}")
        place = Path(model.name)
        if (place / MANIFEST_FILE).is_file() and place.resolve() not in above:
            _grow(branch, place, load_manifest(place), above | {place.resolve()})


def _name(path: Path, manifest: Manifest) -> str:
    return f"{manifest.kind} {manifest.fingerprint[:12]} {escape(str(path))}"


def _place(path: Path, parent: Parent) -> str:
    from tsdkd.artifacts.manifest import HUB_DATASET

    return parent.path if parent.kind == HUB_DATASET else _from_here(path / parent.path)


def _from_here(path: Path) -> str:
    place = path.resolve()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(place)


def _files(manifest: Manifest) -> str:
    rows = f"{manifest.rows:,} rows, " if any(part.rows is not None for part in manifest.parts) else ""
    return f"{len(manifest.parts)}, {rows}{sum(part.bytes for part in manifest.parts) / 1e6:,.1f} MB"


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
