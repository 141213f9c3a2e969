"""The benchmarks by name: which lm-eval task stands for each, with the paper's shots and the metric that is reported.

Loads without lm-eval and torch. A task reaches lm-eval as an overlay: a YAML file that includes the stock task and
changes only shots and, for local data, where the rows are.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tsdkd.errors import InputError

EMBEDDED_DATA = Path(__file__).parents[1] / "embedded"


@dataclass(frozen=True, slots=True)
class Benchmark:
    name: str
    task: str
    """lm-eval's task name."""
    yaml: str
    """The stock file, relative to lm_eval/tasks; or, for our own task, to `EMBEDDED_DATA`."""
    shots: int
    metric: str
    """Headline "metric,filter" key."""
    others: tuple[str, ...] = ()
    """Keys reported beside it."""
    splits: tuple[str, ...] = ()
    """Splits a run reads; a local copy is FOLDER/<split>.parquet."""
    overrides: dict[str, Any] = field(default_factory=dict)

    def overlay(self, data: Path | None) -> dict[str, Any]:
        """The YAML content that lm-eval loads. Raises InputError when a local file is missing."""
        content = {"include": str(self._stock()), "task": self.task, "num_fewshot": self.shots, **self.overrides}
        if data is None:
            return content
        files = self.files(data)
        missing = [str(file) for file in files.values() if not file.is_file()]
        if missing:
            raise InputError(
                f"{self.name} needs {missing[0]}.", "Put the split there, or leave out --data to use the hub."
            )
        local = {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {k: str(v.resolve()) for k, v in files.items()}},
        }
        return content | local

    def files(self, data: Path) -> dict[str, Path]:
        return {split: data / self.name / f"{split}.parquet" for split in self.splits}

    def _stock(self) -> Path:
        if self.name == "embedded":
            return EMBEDDED_DATA / self.yaml
        spec = find_spec("lm_eval")
        if spec is None or spec.origin is None:
            raise InputError("lm-eval is not installed.", "Run `pip install 'lm-eval[hf,ifeval,math]==0.4.13'`.")
        return Path(spec.origin).parent / "tasks" / self.yaml


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="embedded",
            task="tsdkd_embedded",
            yaml="benchmark.yaml",
            shots=0,
            metric="acc,none",
            splits=("benchmark",),
        ),
        # The paper does not say which of GSM8K's two filters it reports; flexible-extract does not punish chat answers.
        Benchmark(
            name="gsm8k",
            task="gsm8k",
            yaml="gsm8k/gsm8k.yaml",
            shots=5,
            metric="exact_match,flexible-extract",
            others=("exact_match,strict-match",),
            splits=("train", "test"),
        ),
        # The stock task loads train and validation for shots that it does not use.
        Benchmark(
            name="sciq",
            task="sciq",
            yaml="sciq/sciq.yaml",
            shots=0,
            metric="acc,none",
            others=("acc_norm,none",),
            splits=("test",),
            overrides={"training_split": None, "validation_split": None},
        ),
    )
}


def choose(names: tuple[str, ...]) -> list[Benchmark]:
    """Benchmarks by name. Raises InputError listing those known."""
    for name in names:
        if name not in BENCHMARKS:
            raise InputError(f"There is no task {name!r}.", f"Choose from: {', '.join(BENCHMARKS)}.")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]
