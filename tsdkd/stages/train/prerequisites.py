"""Checks of training's inputs: responses and their authors, lengths, models, and whether scores are fresh."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.artifacts.reader import Artifact
from tsdkd.errors import InputError
from tsdkd.processes import world_size
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data.offline import OfflineSource, RolloutSource, response_authors
from tsdkd.stages.data.provenance import Provenance, report_lines
from tsdkd.stages.data.rollout_teachers import unknown_teacher
from tsdkd.stages.data.source import Sample
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.adapters import is_adapter
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import require_same_template, require_same_tokenizer
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.models.vocabulary import require_known_ids
from tsdkd.stages.observer import Observer


def require_full_weights(student: ModelRecord) -> None:
    """Raises InputError for an adapter."""
    if is_adapter(model_directory(student.name)):
        raise InputError(
            f"{student.name} is an adapter, but training starts from full weights.",
            "Train it with --lora --merge, or merge it into its model, and name the merged model.",
        )


def require_scored_samplers(source: RolloutSource) -> None:
    """Raises InputError unless the models that sampled the responses are those that were scored."""
    *_, scores = source.parents
    scored = {model.role: model for model in scores.manifest.models}
    for sampler in source.rollouts.manifest.models:
        name = sampler.teacher_name or ""
        if sampler.role not in scored or sampler.weights != scored[sampler.role].weights:
            raise InputError(
                f"These scores are of another {sampler.role} than the one that sampled ({sampler.name}).",
                f"Score with --{'teacher' if name else sampler.role} {name and f'{name}='}{sampler.name}.",
            )


def require_readable_samples(samples: list[Sample], max_length: int, specs: Iterable[ModelSpec]) -> None:
    """Raises InputError for a model whose context is shorter than `max_length`, or that does not know an id."""
    require_context(specs, max_length)
    largest_id = max(max(sample["prompt_ids"] + sample["response_ids"]) for sample in samples)
    for spec in specs:
        require_known_ids(spec.name, spec.vocab, largest_id)


def require_responses(config: TrainConfig, recorded: Artifact | None) -> None:
    """Raises InputError unless the method learns from these responses, sampled and recorded, and they exist."""
    assert config.online is not None
    online, method = config.online, find_method(config.method)
    options = method.read_options(config.method_options)
    if not method.needs_teacher:
        raise InputError(f"{method.name} learns from recorded responses alone.", "Give --rollouts, without --teacher.")
    method.require_student_fraction(online.student_fraction)
    method.require_unmodified_sampling(asdict(online.sampling), options)
    if online.teacher_fraction and "mixture" not in method.authors_with(options):
        raise InputError(
            f"{method.name} does not learn from responses that both models sample.", "Give --teacher-fraction 0."
        )
    if method.has_policy_gradient(options) and online.student_fraction < 1:
        raise InputError(
            f"Online, {method.name} learns only from responses that are sampled during training.",
            "Give --lambda 1, or leave out --lambda.",
        )
    if method.has_policy_gradient(options) and online.rollout_ahead:
        raise InputError(
            f"{method.name} learns from responses of the current student, and --rollout-ahead samples a step earlier.",
            "Leave out --rollout-ahead.",
        )
    if recorded is None and online.student_fraction < 1:
        alternative = ", or --lambda 1" if method.online_responses and not method.uses_replay else ""
        raise InputError(
            f"lambda is {online.student_fraction}, but the other prompts have no recorded responses.",
            f"Give --rollouts in place of --prompts{alternative}.",
        )
    if recorded is not None and online.student_fraction < 1:
        method.require_authors(response_authors(recorded), options)
    if online.replay and world_size() > 1:
        raise InputError(f"{method.name} trains in one process: its replay is not distributed.", "Start one process.")


def require_known_teachers(data: Path, samples: list[Sample], teachers: Collection[str], observer: Observer) -> None:
    """Raises InputError for a sample whose teacher is not among these names; warns of a teacher without samples."""
    named = {sample.get("teacher") or "": sample["sample_id"] for sample in samples}
    for name in sorted(named.keys() - {*teachers}):
        raise unknown_teacher(data, named[name], name, teachers)
    for name in teachers:
        if name not in named:
            observer.warning(f"No prompt has the teacher {name}.")


def require_same_authors(rollouts: Artifact | None, models: Sequence[ModelRecord], observer: Observer) -> None:
    """Warns where rollouts are by other teachers. `models`: the student and the teachers.

    Raises InputError where tokenizers differ, or the template of the rollouts is another one.
    """
    student, *teachers = models
    for teacher in teachers:
        require_same_tokenizer(student, teacher)
    if rollouts is None:
        return
    require_same_template(rollouts.manifest.models[0], student)
    weights = {teacher.role: teacher.weights for teacher in teachers}
    for author in rollouts.manifest.models:
        require_same_tokenizer(author, student)
        if author.teacher_name is not None and author.weights != weights.get(author.role):
            observer.warning(f"The rollouts are by another {author.role} ({author.name}) than the one that is loaded.")


def report_provenance(source: OfflineSource, record: ModelRecord, student: LanguageModel, observer: Observer) -> None:
    """Report the provenance of rollouts and scores; a warning names each condition that is not met.

    The student reads responses only if its weights are not those of the scored student.
    """
    provenance = Provenance(record, source.rollouts.manifest, source.scores.manifest)
    staleness = None if provenance.has_same_weights else source.measure_staleness(student)
    met, unmet = report_lines(provenance.facts(staleness))
    if met:
        observer.info(met)
    if unmet:
        observer.warning(unmet)
