"""Results that new benchmarks are added to: what they hold, and which options they were measured with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.manifest import Manifest, load_manifest
from tsdkd.errors import ArtifactError
from tsdkd.stages.config.chat import recorded_config
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.option import config_options
from tsdkd.stages.results.benchmarks import BENCHMARKS, choose_benchmarks

DATASET_KIND = " rows"
"""Suffix of the kind of a parent that is a local dataset."""


def previous_results(output: Path) -> Manifest | None:
    """The manifest of existing results, reduced to the complete benchmarks and their datasets."""
    if not (output / MANIFEST_FILE).is_file():
        return None
    manifest = load_manifest(output)
    if manifest.kind != "results":
        return None
    files = {part.file for part in manifest.parts}
    complete = [b for b in choose_benchmarks(manifest.config["tasks"]) if f"{b.file_stem}.json" in files]
    kinds = {f"{b.dataset}{DATASET_KIND}" for b in complete if b.dataset}
    return replace(
        manifest,
        config=manifest.config | {"tasks": [benchmark.name for benchmark in complete]},
        parents=tuple(parent for parent in manifest.parents if parent.kind in kinds),
    )


def extendable_fields(previous: Manifest | None) -> set[str]:
    """Fields of the identity that new benchmarks may change: the tasks, and datasets that no complete one used."""
    used = {parent.kind for parent in previous.parents} if previous else set()
    kinds = {f"{benchmark.dataset}{DATASET_KIND}" for benchmark in BENCHMARKS.values()}
    return {"config.tasks"} | {f"parent {kind}" for kind in kinds - used}


def require_same_settings(output: Path, previous: Manifest, config: EvalConfig) -> None:
    """Raises ArtifactError where existing results were measured with other options."""
    before, after = previous.config, recorded_config(config)
    differing = [name for name in after if name in before and name != "tasks" and before[name] != after[name]]
    if differing and previous.parts:
        measured, requested = (
            " and ".join(_option(name, values[name]) for name in differing) for values in (before, after)
        )
        raise ArtifactError(
            f"The results at {output} were measured {measured}; this command measures {requested}.",
            f"Run eval {measured}, choose another directory with --results, or replace the results with --overwrite.",
        )


def _option(name: str, value: Any) -> str:
    """A setting of the command line, in words."""
    option = f"--{next(option.name for option in config_options(EvalConfig) if option.key == name)}"
    if value is None:
        return f"without {option}"
    if isinstance(value, bool):
        return f"with {option if value else option.replace('--', '--no-', 1)}"
    return f"with {option} {value}"
