"""eval: any model -> results. Benchmarks through lm-eval, and closeness to the teacher on held-out responses.

Every benchmark becomes one part with its samples; a finished one is not run again.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import yaml

from tsdkd.artifacts import SCHEMAS, Artifact, Manifest, Parent, Writer, file_digest, relative
from tsdkd.errors import TsdkdError
from tsdkd.stages.benchmarks import EMBEDDED_DATA, Benchmark, choose
from tsdkd.stages.config import EvalConfig
from tsdkd.stages.heldout import HeldOut, answer, measure, require_hidden
from tsdkd.stages.models import LanguageModel, describe, libraries, load_model, require_same_tokenizer
from tsdkd.stages.report import Reporter, Silent
from tsdkd.stages.staged import StagedSamples

HELDOUT_FILE = "heldout.json"


def evaluate(
    model: str,
    output: Path,
    config: EvalConfig,
    data: Path | None = None,
    heldout: Path | None = None,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Measure one model. `data`: local benchmark folders; `heldout`: a run directory with rollouts and scores.

    Raises InputError before anything is written.
    """
    reporter = reporter or Silent()
    benchmarks = choose(config.tasks)
    overlays = {benchmark.name: benchmark.overlay(_data_of(benchmark, data)) for benchmark in benchmarks}
    record = describe("evaluated", model)
    parents = [
        Parent(f"{benchmark.name} {split}", file_digest(file), relative(file, output))
        for benchmark in benchmarks
        if (place := _data_of(benchmark, data)) is not None
        for split, file in benchmark.files(place).items()
    ]
    samples = None
    if heldout is not None:
        samples = StagedSamples(heldout / "rollouts", heldout / "scores")
        require_hidden(samples)
        require_same_tokenizer(record, samples.scores.manifest.model("teacher"))
        parents += [samples.scores.as_parent_of(output)]
    manifest = Manifest(
        kind="results",
        config=asdict(config),
        seed=0,
        parents=tuple(parents),
        models=(record,),
        engine="lm-eval 0.4.13 on transformers",
        libraries=libraries(),
    )
    with Writer.open(output, manifest, overwrite=overwrite) as writer:
        if writer.complete:
            reporter.say(f"{output} is complete: nothing to do.")
            return writer.artifact
        language_model = load_model(model, config.dtype)
        if samples is not None and not writer.has(HELDOUT_FILE):
            with reporter.progress("held-out responses read", len(samples), "responses") as advance:
                closeness = measure(
                    language_model,
                    language_model.head,
                    HeldOut(samples, range(len(samples))),
                    config.batch_size * 512,
                    advance,
                )
            closeness |= answer(language_model, samples)
            writer.aside(HELDOUT_FILE).write_text(json.dumps(closeness))
            writer.add_file(HELDOUT_FILE)
        for benchmark in benchmarks:
            if not writer.has(f"{benchmark.name}.json"):
                result, rows = _run(language_model, benchmark, overlays[benchmark.name], config, reporter)
                writer.write_table(f"{benchmark.name}.parquet", pa.Table.from_pylist(rows, SCHEMAS["results"]))
                writer.aside(f"{benchmark.name}.json").write_text(json.dumps(result))
                writer.add_file(f"{benchmark.name}.json")
        names = [HELDOUT_FILE] * (samples is not None) + [f"{benchmark.name}.json" for benchmark in benchmarks]
        return writer.finish({Path(name).stem: json.loads((output / name).read_text()) for name in names})


def _data_of(benchmark: Benchmark, data: Path | None) -> Path | None:
    return EMBEDDED_DATA.parent if benchmark.name == "embedded" else data


def _run(
    language_model: LanguageModel, benchmark: Benchmark, overlay: dict[str, Any], config: EvalConfig, reporter: Reporter
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with TemporaryDirectory() as directory, _quiet_lm_eval(f"{benchmark.name} answered", reporter) as lm_eval:
        (Path(directory) / "task.yaml").write_text(yaml.safe_dump(overlay))
        results = lm_eval.simple_evaluate(
            model=lm_eval.models.huggingface.HFLM(
                pretrained=language_model.model,
                tokenizer=language_model.tokenizer,
                batch_size=config.batch_size,
                max_length=min(config.max_length, language_model.context),
            ),
            tasks=[benchmark.task],
            task_manager=lm_eval.tasks.TaskManager(include_path=directory, include_defaults=False),
            limit=config.limit,
            apply_chat_template=_uses_chat_template(language_model, config),
            bootstrap_iters=1,  # every metric here is a mean: the closed form of its standard error is used
            log_samples=True,
        )
    if results is None:
        raise TsdkdError(f"lm-eval gave no results for {benchmark.name}.", "Run eval in a single process.")
    measured = results["results"][benchmark.task]
    samples = results["samples"][benchmark.task]
    return _headline(benchmark, measured, len({s["doc_id"] for s in samples})), [_row(benchmark, s) for s in samples]


def _uses_chat_template(language_model: LanguageModel, config: EvalConfig) -> bool:
    return language_model.tokenizer.chat_template is not None if config.chat_template is None else config.chat_template


def _headline(benchmark: Benchmark, measured: dict[str, Any], documents: int) -> dict[str, Any]:
    def stderr(key: str) -> float | None:
        value = measured.get(key.replace(",", "_stderr,"))
        return None if isinstance(value, str) or value is None else float(value)

    return {
        "metric": benchmark.metric,
        "value": float(measured[benchmark.metric]),
        "stderr": stderr(benchmark.metric),
        "documents": documents,
        "others": {key: [float(measured[key]), stderr(key)] for key in benchmark.others},
    }


def _row(benchmark: Benchmark, sample: dict[str, Any]) -> dict[str, Any]:
    metric = sample["metrics"][0]
    chosen = sample["filtered_resps"]
    return {
        "task": benchmark.name,
        "document": sample["doc_id"],
        "metric": f"{metric},{sample['filter']}",
        "prompt": str(sample["arguments"][0][0]),
        "answer": str(sample["resps"][0][0]) if len(sample["resps"]) == 1 else str(sample["resps"]),
        "extracted": str(chosen[0] if len(chosen) == 1 else chosen),
        "target": str(sample["target"]),
        "score": float(sample[metric]),
    }


@contextmanager
def _quiet_lm_eval(what: str, reporter: Reporter) -> Iterator[Any]:
    """lm-eval with its progress shown by the reporter, and nothing else on the screen."""
    import datasets
    import lm_eval
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with ExitStack() as patches, ExitStack() as bars:

        class Bar:
            def __init__(self, *_: Any, total: int = 0, **__: Any) -> None:
                self.update = bars.enter_context(reporter.progress(what, total, "requests"))

            def close(self) -> None:
                bars.close()

        for module, name, replacement in (
            (lm_eval.models.huggingface, "tqdm", Bar),
            (lm_eval.api.task, "tqdm", _silent_bar),
            (lm_eval.api.model, "tqdm", _silent_bar),
            (lm_eval.evaluator, "get_git_commit_hash", lambda: None),
            (lm_eval.evaluator, "add_env_info", lambda _: None),  # seconds of subprocesses, and not recorded here
        ):
            patches.enter_context(patch.object(module, name, replacement))
        yield lm_eval


def _silent_bar(rows: Any, **_: Any) -> Any:
    return rows
