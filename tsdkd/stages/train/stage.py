"""train: rollouts and scores -> checkpoint (offline), or prompts and a loaded teacher -> checkpoint (online).

The loss is a mean over each response's tokens, then over the responses of the optimizer batch, so micro-batches and
padding do not change the update. A run that is killed at any moment resumes from its last saved step and ends with the
same weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import ModelRecord, teachers_by_name
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.core import SelectiveObjective
from tsdkd.errors import InputError
from tsdkd.processes import rank
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.data.held_out import HeldOut, split_held_out
from tsdkd.stages.data.offline import OfflineSource, RolloutSource, response_authors
from tsdkd.stages.data.online import (
    OnlineSource,
    ResponseSampler,
    longest_sequence,
    samples_from_prompts,
    samples_from_rollouts,
)
from tsdkd.stages.data.online_teachers import OnlineTeacher
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.readable import require_readable
from tsdkd.stages.data.recorded_chat import chat_of_rollouts, template_parents
from tsdkd.stages.data.replay import ReplaySchedule, ReplaySource
from tsdkd.stages.data.rollout_ahead import AheadSource
from tsdkd.stages.data.rollout_teachers import column_of_teachers
from tsdkd.stages.data.source import Sample
from tsdkd.stages.engines.choice import with_supported_draft
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.chat import pair_end_ids
from tsdkd.stages.models.device import forward_precision
from tsdkd.stages.models.distributed import gather
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.record import chat_day, model_record, require_same_template, require_same_tokenizer
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.teacher_server.server import open_servers
from tsdkd.stages.train.hosts import failing_together
from tsdkd.stages.train.loop import TrainingData, TrainingInputs, checkpoint_manifest, run_training
from tsdkd.stages.train.prerequisites import (
    report_provenance,
    require_known_teachers,
    require_readable_samples,
    require_responses,
    require_same_authors,
    require_scored_samplers,
)
from tsdkd.stages.train.sampling import find_ends, open_sampler, require_rollout_server, with_engine
from tsdkd.stages.train.teacher import Teachers, model_records, open_teacher, require_served_length, with_signal
from tsdkd.stages.train.trial import TriedObjective, try_objective

SERVED_TOP_K = 20
"""Log-probabilities per token of a served teacher: the most that vLLM gives unless it is told otherwise."""


@failing_together()
@reading_inputs()
def train_offline(
    rollouts: Path,
    scores: Path | None,
    student: str,
    output: Path,
    config: TrainConfig,
    seed: int = 0,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Distil the teacher that recorded scores describe; without scores, learn from the responses alone.

    Raises InputError before anything is written, KeyboardInterrupt after an interrupted step is finished and saved,
    NotFiniteError when the loss or the gradient is not finite.
    """
    observer = observer or SilentObserver()
    method = find_method(config.method)
    chat = chat_of_rollouts(read_artifact(rollouts, "rollouts", hashed=False), config.chat)
    config = replace(config, chat=ChatConfig())  # the parent records it
    tried = try_objective(config)
    record = model_record("student", student, chat=chat)
    source = RolloutSource(rollouts) if scores is None else _scored_source(rollouts, scores, record, config, tried)
    if scores is None and method.needs_teacher:
        raise InputError(f"{config.method} needs scores of these responses.", "Run `tsdkd score` first.")
    if scores is not None and not method.needs_teacher:
        raise InputError(f"{config.method} learns from the teacher's responses alone.", "Leave out the scores.")
    if scores is None and isinstance(tried.objective, SelectiveObjective):
        tried.objective.require_signal("responses")
    if scores is None and config.compile:
        raise InputError(f"--compile has no effect on {config.method}.", "Leave out --compile.")
    options = method.read_options(config.method_options)
    method.require_authors(response_authors(source.rollouts), options)
    method.require_unmodified_sampling(source.rollouts.manifest.config, options)
    if method.objective.policy_gradient_weight:
        require_scored_samplers(source)
    for model in source.teachers or (source.rollouts.manifest.model("student"),):
        require_same_tokenizer(record, model)
    require_same_template(source.rollouts.manifest.models[0], record)
    spec = load_spec(student)
    require_readable(source.rollouts, [spec])
    indices, held_out = split_held_out(source, config.held_out)
    data = TrainingData(source, indices, HeldOut(source, held_out) if held_out else None)

    def open_data(learner: LanguageModel) -> AbstractContextManager[TrainingData]:
        if isinstance(source, OfflineSource) and rank() == 0:
            report_provenance(source, record, learner, observer)
        return nullcontext(data)

    inputs = TrainingInputs(
        student=record,
        teachers=source.teachers,
        parents=tuple(parent.as_parent_of(output) for parent in source.parents),
        max_length=max(source.length(i) for i in indices),
        vocab=source.shared_vocab(spec),
        end_ids=pair_end_ids(spec.tokenizer, spec.end_ids, source.end_ids(spec.tokenizer)),
        open_data=open_data,
        chat=chat,
    )
    return run_training(inputs, output, config, seed, observer, overwrite)


def _scored_source(
    rollouts: Path, scores: Path, student: ModelRecord, config: TrainConfig, tried: TriedObjective
) -> OfflineSource:
    """Rollouts with their scores. Raises InputError when the scores do not suffice for the objective."""
    source = OfflineSource(rollouts, scores)
    source.decoder.require_support(tried.objective, held_out=bool(config.held_out))
    if tried.tempered:
        source.decoder.require_temperature_1("another")
    if config.compile and not source.decoder.heads:
        raise InputError(
            f"--compile needs the teacher's hidden states, but these scores hold {source.decoder.signal!r}.",
            "Leave out --compile, or score with --signal hidden.",
        )
    require_same_tokenizer(student, source.scores.manifest.model("student"))
    return source


@failing_together()
@reading_inputs()
def train_online(
    data: Path,
    student: str,
    teachers: str | Teachers,
    output: Path,
    config: TrainConfig,
    seed: int = 0,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Distil a loaded or served teacher: the student responds to `config.online.student_fraction` of the prompts.

    `data`: a prompts file, or a rollouts artifact whose responses the other prompts keep. `teachers`: one, or several
    by name, each of which reads the responses to its own prompts. Raises as `train_offline`.
    """
    observer = observer or SilentObserver()
    assert config.online is not None
    teachers = teachers_by_name(teachers)
    recorded = read_artifact(data, "rollouts") if (data / MANIFEST_FILE).is_file() else None
    online = _effective(config, teachers, recorded, observer)
    sampling = online.sampling
    chat, chat_parents = config.chat, template_parents(config.chat, output)
    if recorded is not None:
        chat, chat_parents = chat_of_rollouts(recorded, config.chat), ()
        config = replace(config, chat=ChatConfig())  # the parent records it
    models = model_records(student, teachers, chat, output)
    require_same_authors(recorded, models, observer)
    prompts = Prompts(
        data, sampling.column, sampling.limit, sampling.system, teacher_by=sampling.teacher_by, teachers=[*teachers]
    )
    require_responses(config, recorded)
    loaded = [model for model in teachers.values() if isinstance(model, str)]
    specs = [load_spec(student, chat), *map(load_spec, loaded)]
    online = replace(online, sampling=with_supported_draft(sampling, specs, observer))
    config, sampling = replace(config, online=online), online.sampling
    parent = prompts.parent(output) if recorded is None else recorded.as_parent_of(output)
    manifest = checkpoint_manifest(models, (parent, *chat_parents), config, seed)
    day = chat_day(specs[0].tokenizer, output, manifest, overwrite) if recorded is None else None
    if recorded is None:
        samples = _samples(prompts, specs[0].tokenizer, sampling.max_prompt_tokens, day, observer)
    else:
        samples = samples_from_rollouts(recorded, sampling.limit, sampling.teacher_by)
    require_known_teachers(data, samples, teachers, observer)
    max_length, vocab = longest_sequence(samples, online), min(spec.vocab for spec in specs)
    require_readable_samples(samples, max_length, specs)
    require_served_length(teachers, max_length)
    ends = find_ends(specs, online, observer)
    served = replace(specs[0], vocab=vocab, end_ids=ends)
    require_rollout_server(served, online, config.lora, max_length)

    @contextmanager
    def open_data(learner: LanguageModel) -> Iterator[TrainingData]:
        reader = open_teacher(teachers, config, vocab, ends, observer)
        with open_sampler(served, learner, reader, online, config.lora, max_length, observer) as sampler:
            yield _online_data(samples, reader, sampler, learner, config, seed)

    inputs = TrainingInputs(
        models[0], models[1:], (parent, *chat_parents), max_length, vocab, ends, open_data, day, chat
    )
    return run_training(inputs, output, config, seed, observer, overwrite)


def _effective(config: TrainConfig, teachers: Teachers, recorded: Artifact | None, observer: Observer) -> OnlineConfig:
    """The online settings, with the server's log-probabilities, the engine, and the column that names teachers."""
    assert config.online is not None
    online = with_signal(config, config.online, teachers, try_objective(config))
    online = with_engine(online, forward_precision(config.precision), observer, quantized=bool(config.quantize))
    column = column_of_teachers(recorded, teachers, online.sampling.teacher_by)
    return replace(online, sampling=replace(online.sampling, teacher_by=column))


def _online_data(
    samples: list[Sample],
    teacher: OnlineTeacher,
    sampler: ResponseSampler,
    learner: LanguageModel,
    config: TrainConfig,
    seed: int,
) -> TrainingData:
    """The samples to train on, and those to measure on, which get their responses and the teacher's reading here."""
    assert config.online is not None
    online = config.online
    source = OnlineSource(samples, teacher, sampler, online.student_fraction, online.teacher_fraction)
    if online.rollout_ahead:
        source = AheadSource(samples, teacher, sampler, online.student_fraction, online.sampling)
    indices, held_out = split_held_out(source, config.held_out)
    own = [samples[i] for i in held_out] if rank() == 0 else []  # sampled once, for all ranks
    responses = source.read_ahead(gather(source.with_responses(own, learner, (seed,))))
    measured = OnlineSource(responses, teacher, sampler, online.student_fraction) if held_out else None
    if online.replay:
        source = ReplaySource(samples, teacher, sampler, ReplaySchedule(online.replay))
    return TrainingData(source, indices, HeldOut(measured, range(len(held_out))) if measured else None)


@failing_together()
def train_served(
    data: Path,
    student: str,
    urls: str | Mapping[str, str],
    names: str | Mapping[str, str] | None,
    output: Path,
    config: TrainConfig,
    seed: int = 0,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """As `train_online`, with a teacher that a server serves, or with several by name.

    `urls`: of each teacher's server; `names`: of its model there, needed where a server serves several.
    """
    assert config.online is not None
    observer, spec = observer or SilentObserver(), load_spec(student)
    top_k = config.online.teacher_top_k or SERVED_TOP_K
    with open_servers(urls, names, spec.tokenizer, vocab=spec.vocab, top_k=top_k, k=1, observer=observer) as servers:
        return train_online(data, student, servers, output, config, seed, observer, overwrite)


def _samples(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, max_tokens: int, day: str | None, observer: Observer
) -> list[Sample]:
    samples, skipped = samples_from_prompts(prompts, tokenizer, max_tokens, day)
    if skipped:
        observer.warning(f"Prompts skipped: {skipped:,} empty or longer than {max_tokens} tokens.")
    return samples
