"""Task files for lm-eval: each includes lm-eval's own file and overrides the settings that a `Benchmark` changes."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from tsdkd.errors import InputError
from tsdkd.stages.results.benchmark import Benchmark, FunctionName


class OverlayDumper(yaml.SafeDumper):
    """Writes a `FunctionName` with lm-eval's tag."""


OverlayDumper.add_representer(FunctionName, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def task_overlays(benchmark: Benchmark, dataset: Path | None = None, cache: Path | None = None) -> dict[str, str]:
    """YAML files by task name. `dataset`: a local copy, or None for the hub; `cache`: where the copy is cached.

    Raises InputError when lm-eval is not installed.
    """
    content = {"num_fewshot": benchmark.shots, **benchmark.overrides}
    if dataset is not None:
        content |= {"dataset_path": str(dataset.resolve()), "dataset_kwargs": {"cache_dir": str(cache)}}
    if not benchmark.stock_files:
        return {benchmark.file_stem: _to_yaml({"task": benchmark.file_stem, **content})}
    files = sorted(file for pattern in benchmark.stock_files for file in _lm_eval_tasks().glob(pattern))
    return {file.stem: _to_yaml({"include": str(file), "task": file.stem, **content}) for file in files}


def _lm_eval_tasks() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise InputError("lm-eval is not installed.", "Run `pip install 'lm-eval[hf,ifeval,math]==0.4.13'`.")
    return Path(spec.origin).parent / "tasks"


def _to_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=OverlayDumper)
