"""generate: prompts -> rollouts. The student answers (on-policy), the teacher (off-policy), each a share, or both.

Token ids are stored as the engine produced them, the end token included. A part's content depends on nothing that
came before it, so an interrupted run ends with the bytes of an uninterrupted one. One part is in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsdkd.artifacts.manifest import Manifest, ModelRecord
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import AUTHORS, SPEED_ONLY_FIELDS, GenerateConfig
from tsdkd.stages.data.prompts import Prompt, Prompts
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.engines.choice import PART_SIZE, choose_engine, engine_version, open_engine, require_engine_options
from tsdkd.stages.engines.engine_check import check_engine
from tsdkd.stages.generate.requests import PromptCounts, PromptRequests, RolloutPart
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.record import library_versions, model_record, require_same_tokenizer
from tsdkd.stages.models.spec import ModelSpec, load_spec
from tsdkd.stages.observer import Observer, SilentObserver


def generate(
    prompts: Path,
    model: str,
    output: Path,
    config: GenerateConfig,
    seed: int = 0,
    observer: Observer | None = None,
    overwrite: bool = False,
    *,
    teacher: str | None = None,
) -> Artifact:
    """Answer prompts with a model; where both models answer it is the student, beside a `teacher`.

    Raises InputError before anything is written, TsdkdError when the engine fails or says other than transformers.
    """
    observer = observer or SilentObserver()
    engine = choose_engine(config)
    require_engine_options(engine, config)
    part_size = config.part_size or PART_SIZE[engine]
    config = replace(config, engine=engine, part_size=part_size)
    records = _describe(config.policy, model, teacher)
    models = {record.role: load_spec(record.name) for record in records}
    reader = models[records[0].role]  # its chat template asks
    source = Prompts(prompts, config.column, config.limit, config.system, config.config_name, config.split)
    jobs = PromptRequests(source, reader.tokenizer, config, part_size, seed)
    census = jobs.count()
    _require_prompts(census, config, prompts)
    require_context(models.values(), census.longest + config.max_new_tokens, limit=config.max_model_len)
    manifest = Manifest(
        kind="rollouts",
        config={name: value for name, value in asdict(config).items() if name not in SPEED_ONLY_FIELDS},
        seed=seed,
        parents=(source.parent(output),),
        models=records,
        engine=engine,
        libraries=library_versions() | engine_version(engine),
    )
    with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(output):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        if census.left_out:
            observer.warning(f"Prompts left out: {format_left_out(census.left_out, config.max_prompt_tokens)}.")
        total = census.prompts.total() * config.samples_per_prompt
        label = f"{' and '.join(models)} answer{'s' if len(models) == 1 else ''} ({engine})"
        with observer.progress(label, total, "responses", writer.manifest.rows) as advance:
            for author in AUTHORS[config.policy]:
                todo = (part for part in jobs.parts(author, census) if not writer.has(part.file))
                _answer(todo, author, models, config, census.longest, writer, advance)
        return writer.finish(_summary(writer.artifact, census))


def format_left_out(counted: Mapping[str, int], longest: int) -> str:
    """Counts by reason, in words."""
    reasons = {"empty": "empty", "repeated": "repeated", "too_long": f"longer than {longest} tokens"}
    return ", ".join(f"{counted[name]:,} {words}" for name, words in reasons.items() if counted.get(name)) or "none"


def _describe(policy: str, model: str, teacher: str | None) -> tuple[ModelRecord, ...]:
    if policy in {"student", "teacher"}:
        return (model_record(policy, model),)
    if teacher is None:
        raise InputError(f"The policy {policy!r} needs a student and a teacher.", "Name both.")
    records = model_record("student", model), model_record("teacher", teacher)
    require_same_tokenizer(*records)
    return records


def _require_prompts(census: PromptCounts, config: GenerateConfig, prompts: Path) -> None:
    if not census.prompts:
        reasons = format_left_out(census.left_out, config.max_prompt_tokens)
        raise InputError(f"No prompt of {prompts} is left: {reasons}.", "Raise --max-prompt-tokens, or mend the file.")


def _answer(
    todo: Iterator[RolloutPart],
    author: str,
    models: Mapping[str, ModelSpec],
    config: GenerateConfig,
    longest_prompt: int,
    writer: Writer,
    advance: Callable[[int], None],
) -> None:
    """Write one author's missing parts; without any, no model is loaded."""
    first = next(todo, None)
    if first is None:
        return
    reader = next(iter(models.values()))
    with open_engine(author, models, config, longest_prompt + config.max_new_tokens) as engine:
        check_engine(engine, first.requests, models, author, config)
        for part, responses in engine.sample(chain([first], todo), advance):
            sampled = zip(part.prompts, part.requests, responses, strict=True)
            rows = [_row(prompt, request, response, author, reader) for prompt, request, response in sampled]
            writer.write_table(part.file, pa.Table.from_pylist(rows, SCHEMAS["rollouts"]))


def _row(prompt: Prompt, request: Request, response: Response, author: str, reader: ModelSpec) -> dict[str, Any]:
    return {
        "sample_id": request.sample_id,
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "messages": prompt.messages,
        "prompt_ids": request.prompt_ids,
        "response_ids": response.ids,
        "response": reader.tokenizer.decode(response.ids, skip_special_tokens=True),
        "finish_reason": "stop" if response.ids[-1] in reader.end_ids else "length",
        "author": author,
        "teacher_tokens": len(response.ids) if author == "teacher" else response.replaced,
    }


def _summary(artifact: Artifact, census: PromptCounts) -> dict[str, Any]:
    totals = dict.fromkeys(("responses", "response_tokens", "teacher_tokens", "truncated"), 0)
    for part in artifact.tables:
        table = pq.read_table(artifact.path / part.file, columns=["response_ids", "finish_reason", "teacher_tokens"])
        totals["responses"] += table.num_rows
        totals["response_tokens"] += pc.sum(pc.list_value_length(table["response_ids"])).as_py()
        totals["teacher_tokens"] += pc.sum(table["teacher_tokens"]).as_py()
        totals["truncated"] += pc.sum(pc.equal(table["finish_reason"], "length")).as_py()
    return {"prompts": census.prompts.total(), "prompts_left_out": dict(census.left_out), **totals}
