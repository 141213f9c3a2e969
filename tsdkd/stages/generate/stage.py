"""generate: prompts -> rollouts, sampled by the student (on-policy), by the teacher (off-policy), or by both.

With several teachers, each prompt names its own. One engine is open at a time.

Token ids are stored as the engine sampled them, with the end token. The content of a part depends on no earlier part,
so that an interrupted run ends with the bytes of an uninterrupted one. One part is in memory at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest, ModelRecord, Parent, teacher_role, teachers_by_name
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.schemas import schema_of
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.generate import GIVEN, GenerateConfig, recorded_sampling, require_effective
from tsdkd.stages.data.messages import text_messages
from tsdkd.stages.data.prompts import Prompt, Prompts
from tsdkd.stages.data.recorded_chat import add_template, template_parents
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.engines.choice import (
    PART_SIZE,
    choose_engine,
    engine_version,
    require_engine_options,
    with_supported_draft,
)
from tsdkd.stages.engines.ends import require_stop_support
from tsdkd.stages.generate.given import record_given
from tsdkd.stages.generate.requests import Authorship, PromptCounts, PromptRequests, RolloutPart
from tsdkd.stages.generate.sampling import OpenSampler
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.chat import pair_end_ids
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.record import chat_day, library_versions, model_record, require_same_tokenizer
from tsdkd.stages.models.spec import ModelSpec, load_spec
from tsdkd.stages.models.vocabulary import require_known_ids
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.parallel.choice import open_pool, require_parallel
from tsdkd.stages.parallel.pool import Pool
from tsdkd.stages.parallel.tasks import Advance


@reading_inputs()
def generate(
    prompts: Path,
    student: str | None,
    output: Path,
    config: GenerateConfig,
    seed: int = 0,
    observer: Observer | None = None,
    overwrite: bool = False,
    *,
    teachers: str | Mapping[str, str] | None = None,
) -> Artifact:
    """Sample responses to prompts and write rollouts; with the policy "given", record the responses that rows hold.

    `student`: None with the policy "teacher". `teachers`: one, or several by name; with the policy "student", their end
    tokens end the student's responses, too. `config.teacher_by` is the column that names each prompt's teacher.
    Raises InputError before anything is written, TsdkdError when the engine fails or disagrees with transformers.
    """
    observer = observer or SilentObserver()
    require_effective(config)
    require_parallel("generate", config)
    by_name = teachers_by_name(teachers or {})
    _require_models(config, student, by_name)
    if config.policy == GIVEN:
        return record_given(prompts, str(student), output, config, seed, observer, overwrite)
    engine = choose_engine(config)
    require_engine_options(engine, config)
    part_size = config.part_size or PART_SIZE[engine]
    config = replace(config, engine=engine, part_size=part_size)
    records = _model_records(config, student, by_name)
    models = _load_specs(records, config)
    require_attention(config.attention, [record.name for record in records])
    tokenizer = _template_model(models).tokenizer
    require_stop_support(config, tokenizer)
    config = with_supported_draft(config, models.values(), observer)
    columns = config.column, config.limit, config.system, config.config_name, config.split, config.teacher_by
    source = Prompts(prompts, *columns, by_name)
    parents = source.parent(output), *template_parents(config.chat, output)
    manifest = _manifest(config, parents, records, seed)
    manifest = replace(manifest, day=chat_day(tokenizer, output, manifest, overwrite))
    requests = PromptRequests(source, tokenizer, config, part_size, seed, manifest.day)
    counts = requests.count()
    _require_prompts(counts, config, prompts)
    max_tokens = counts.longest + config.response_limit
    require_context(models.values(), max_tokens, limit=config.max_model_len)
    for spec in models.values():
        require_known_ids(spec.name, spec.vocab, counts.largest_id)
    with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(writer.path):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        add_template(writer, config.chat)
        _warn(models, by_name, counts, config, observer)
        total = counts.total * config.samples_per_prompt
        with (
            open_pool(config, config.tensor_parallel, records, observer) as pool,
            observer.progress(_label(config, models), total, "responses", writer.manifest.rows) as advance,
        ):
            for authorship in sorted(counts.by_authorship):
                missing = (part for part in requests.parts(authorship, counts) if not writer.has(part.file))
                _sample_parts(missing, authorship, models, config, max_tokens, writer, pool, advance)
        return writer.finish(_summary(writer.artifact, counts), observer.info)


def _load_specs(records: Sequence[ModelRecord], config: GenerateConfig) -> dict[str, ModelSpec]:
    """The models by role, all with the ids and the end tokens of the pair."""
    models = {record.role: load_spec(record.name, _chat_of(record.role, config)) for record in records}
    vocab = min(spec.vocab for spec in models.values())
    tokenizer = _template_model(models).tokenizer
    ends = [i for i in pair_end_ids(tokenizer, *(spec.end_ids for spec in models.values())) if i < vocab]
    return {role: replace(spec, vocab=vocab, end_ids=ends) for role, spec in models.items()}


def _label(config: GenerateConfig, models: Mapping[str, ModelSpec]) -> str:
    """Names the models that respond, with the engine."""
    roles = ["student"] if config.policy == "student" else [*models]
    return f"{' and '.join(roles)} respond{'s' * (len(roles) == 1)} ({config.engine})"


def _warn(
    models: Mapping[str, ModelSpec],
    teachers: Iterable[str],
    counts: PromptCounts,
    config: GenerateConfig,
    observer: Observer,
) -> None:
    """Warn of responses without an end, of teachers without a prompt, and of skipped prompts."""
    if not config.stop and not any(spec.end_ids for spec in models.values()):
        named = f"The {' and the '.join(models)} {'has' if len(models) == 1 else 'have'}"
        observer.warning(f"{named} no end token: every response has {config.response_limit} tokens.")
    for name in teachers:
        if not counts.by_teacher[name]:
            observer.warning(f"No prompt has the teacher {name}: the column {config.teacher_by} does not name it.")
    if counts.skipped:
        observer.warning(f"Prompts skipped: {format_skipped(counts.skipped, config.max_prompt_tokens)}.")


def _manifest(
    config: GenerateConfig, parents: tuple[Parent, ...], models: tuple[ModelRecord, ...], seed: int
) -> Manifest:
    """`config`: with the engine that was chosen."""
    return Manifest(
        kind="rollouts",
        config=recorded_sampling(config),
        seed=seed,
        parents=parents,
        models=models,
        engine=config.engine,
        libraries=library_versions() | engine_version(config.engine),
    )


def format_skipped(skipped: Mapping[str, int], max_prompt_tokens: int) -> str:
    """Counts of skipped prompts by reason, in words."""
    reasons = {"empty": "empty", "duplicate": "duplicate", "too_long": f"longer than {max_prompt_tokens} tokens"}
    return ", ".join(f"{skipped[name]:,} {words}" for name, words in reasons.items() if skipped.get(name)) or "none"


def _template_model(models: Mapping[str, ModelSpec]) -> ModelSpec:
    """The model whose chat template is used: the student, or a teacher that responds alone."""
    return next(iter(models.values()))


def _chat_of(role: str, config: GenerateConfig) -> ChatConfig | None:
    """The chat format of a model: only that of the prompts' template is changed."""
    return config.chat if role == "student" or config.policy == "teacher" else None


def _require_models(config: GenerateConfig, student: str | None, teachers: Mapping[str, str]) -> None:
    """Raises InputError for missing models, for unused ones, and for teachers that prompts cannot name."""
    policy, given = config.policy, {role for role, name in (("student", student), ("teacher", teachers)) if name}
    needed = {"student": {"student"}, "teacher": {"teacher"}, GIVEN: {"student"}}.get(policy, {"student", "teacher"})
    if needed - given:
        raise InputError(f"The policy {policy!r} needs a {' and a '.join(sorted(needed))}.", "Name every model.")
    if policy in {"teacher", GIVEN} and given - needed:
        raise InputError(f"The policy {policy!r} does not use the {min(given - needed)}.", "Leave it out.")
    if teachers and ("" in teachers) == (config.teacher_by is not None):
        raise InputError(
            "Teachers have names exactly if a column names the teacher of each prompt.",
            "Give --teacher-by COLUMN and --teacher NAME=MODEL for each name, or one teacher without both.",
        )


def _model_records(config: GenerateConfig, student: str | None, teachers: Mapping[str, str]) -> tuple[ModelRecord, ...]:
    """The student, then the teachers by name."""
    names = ({} if student is None else {"student": student}) | {
        teacher_role(name): model for name, model in teachers.items()
    }
    first, *others = [model_record(role, name, chat=_chat_of(role, config)) for role, name in names.items()]
    for other in others:
        require_same_tokenizer(first, other)
        if config.policy == "teacher" and other.chat_template != first.chat_template:
            raise InputError(
                f"{first.role} {first.name} and {other.role} {other.name} have different chat templates.",
                "Give all the same one with --chat-template, or let the student's write the prompts: --policy mixed "
                "--lambda 0.",
            )
    return first, *others


def _require_prompts(counts: PromptCounts, config: GenerateConfig, prompts: Path) -> None:
    if not counts.total:
        reasons = format_skipped(counts.skipped, config.max_prompt_tokens)
        remedy = "Raise --max-prompt-tokens, or correct" if counts.skipped["too_long"] else "Correct"
        raise InputError(f"Every prompt of {prompts} is skipped: {reasons}.", f"{remedy} the prompts.")


def _sample_parts(
    parts: Iterator[RolloutPart],
    authorship: Authorship,
    models: Mapping[str, ModelSpec],
    config: GenerateConfig,
    max_tokens: int,
    writer: Writer,
    pool: Pool,
    advance: Advance,
) -> None:
    """Sample and write parts of one authorship. Loads no model without a part."""
    first = next(parts, None)
    if first is None:
        return
    author, own = authorship.author, {"student": "student", "teacher": teacher_role(authorship.teacher)}
    pair = {role: models[recorded] for role, recorded in own.items() if recorded in models}

    def write(part: RolloutPart, responses: list[Response]) -> None:
        sampled = zip(part.prompts, part.requests, responses, strict=True)
        rows = [_row(*row, author, _template_model(models).tokenizer) for row in sampled]
        writer.write_table(part.file, pa.Table.from_pylist(rows, _schema(config)))

    open_sampler = OpenSampler(author, pair, config, max_tokens, first.requests)
    pool.run(open_sampler, chain([first], parts), write, advance)


def _schema(config: GenerateConfig) -> pa.Schema:
    return schema_of("rollouts", ["teacher"] if config.teacher_by else [])


def _row(
    prompt: Prompt, request: Request, response: Response, author: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A row of the rollouts schema; "teacher" is none of its columns where prompts name no teacher."""
    return {
        "sample_id": request.sample_id,
        "prompt_id": prompt.prompt_id,
        "source": prompt.source,
        "messages": text_messages(prompt.messages),
        "prompt_ids": request.prompt_ids,
        "response_ids": response.ids,
        "response": tokenizer.decode(response.ids, skip_special_tokens=True),
        "finish_reason": response.finish_reason,
        "author": author,
        "teacher_tokens": len(response.ids) if author == "teacher" else response.replaced,
        "teacher": prompt.teacher,
    }


def _summary(rollouts: Artifact, counts: PromptCounts) -> dict[str, Any]:
    """Totals over all parts, which are read one by one."""
    totals = dict.fromkeys(("responses", "response_tokens", "teacher_tokens", "truncated"), 0)
    for part in rollouts.tables:
        table = rollouts.read_part(part, ["response_ids", "finish_reason", "teacher_tokens"])
        totals["responses"] += table.num_rows
        totals["response_tokens"] += pc.sum(pc.list_value_length(table["response_ids"])).as_py()
        totals["teacher_tokens"] += pc.sum(table["teacher_tokens"]).as_py()
        totals["truncated"] += pc.sum(pc.equal(table["finish_reason"], "length")).as_py()
    return {"prompts": counts.total, "prompts_skipped": dict(counts.skipped), **totals}
