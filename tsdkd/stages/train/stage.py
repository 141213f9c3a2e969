"""train: rollouts + scores -> checkpoint, the teacher absent; or prompts + a live teacher -> checkpoint.

Which objective, is a name of `objectives`; one of them needs the rollouts alone.

Everything is per response, then averaged over the optimizer batch's responses: micro-batches and padding do not change
the update. Killed at any moment, a run continues from its last saved step and ends with the same weights.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from tsdkd.artifacts.manifest import MANIFEST_FILE, ModelRecord
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.errors import InputError
from tsdkd.ranks import world_size
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.data.held_out import HeldOut
from tsdkd.stages.data.offline import OfflineSource, RolloutSource, response_authors
from tsdkd.stages.data.online import (
    OnlineSource,
    ResponseSampler,
    longest_sequence,
    samples_from_prompts,
    samples_from_rollouts,
)
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.randomness import random_uniform
from tsdkd.stages.data.replay import ReplaySchedule, ReplaySource
from tsdkd.stages.data.sources import Source
from tsdkd.stages.engines.choice import choose_engine
from tsdkd.stages.engines.online import LocalSampler
from tsdkd.stages.methods import Method, find_method
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.device import forward_precision
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.record import model_record, require_same_tokenizer
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.train.loop import TrainingJob, run_training


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
    """Distil staged scores into the student, or the responses alone where the objective needs no more.

    Raises InputError before anything is written, KeyboardInterrupt after an interrupted step was finished and saved,
    TsdkdError when the loss is not finite.
    """
    observer = observer or SilentObserver()
    start = model_record("student", student)
    samples = RolloutSource(rollouts) if scores is None else _scored(rollouts, scores, start, config, observer)
    objective = find_method(config.method)
    if scores is None and objective.teacher:
        raise InputError(f"{config.method} needs the teacher's view of the responses.", "Run `tsdkd score` first.")
    if scores is not None and not objective.teacher:
        raise InputError(f"{config.method} learns from the teacher's responses alone.", "Leave out the scores.")
    if scores is None and config.compile:
        raise InputError(f"{config.method} has nothing to compile.", "Leave out --compile.")
    objective.require_authors(response_authors(samples.rollouts))
    objective.require_sampling(samples.rollouts.manifest.config)
    if objective.objective.policy_gradient_weight:
        _require_samplers(samples)
    require_same_tokenizer(start, samples.teacher)
    learned, held = _split(samples, config)
    job = TrainingJob(
        student=start,
        teacher=samples.teacher,
        parents=tuple(parent.as_parent_of(output) for parent in samples.parents),
        longest=max(samples.length(i) for i in learned),
        open=lambda _: nullcontext((samples, learned, HeldOut(samples, held) if held else None)),
    )
    return run_training(job, output, config, seed, observer, overwrite)


def _scored(rollouts: Path, scores: Path, start: ModelRecord, config: TrainConfig, observer: Observer) -> OfflineSource:
    samples = OfflineSource(rollouts, scores)
    samples.decoder.require_support(config.objective)
    if config.compile and samples.decoder.head is None:
        raise InputError(
            f"--compile needs the teacher's hidden states, but these scores hold {samples.decoder.signal!r}.",
            "Leave out --compile, or score with --signal hidden.",
        )
    scored = samples.scores.manifest.model("student")
    require_same_tokenizer(start, scored)
    if start.weights != scored.weights:
        observer.warning(f"The student is another than the one that was scored ({scored.name}).")
    return samples


def _require_samplers(samples: RolloutSource) -> None:
    """Raise InputError when the models that were scored are not those that sampled."""
    *_, last = samples.parents
    scored = {model.role: model for model in last.manifest.models}
    for sampler in samples.rollouts.manifest.models:
        if sampler.weights != scored[sampler.role].weights:
            raise InputError(
                f"These scores are of another {sampler.role} than the one that sampled ({sampler.name}).",
                f"Score with --{sampler.role} {sampler.name}.",
            )


def train_online(
    data: Path,
    student: str,
    teacher: str,
    output: Path,
    config: TrainConfig,
    seed: int = 0,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Distil a teacher that reads along: the student answers a share `config.online.student_fraction` of prompts as it learns.

    `data`: a prompts file, or a rollouts artifact whose responses the other prompts keep. Raises as `train`.
    """
    observer = observer or SilentObserver()
    assert config.online is not None
    online = _resolved(config.online, forward_precision(config.precision), observer)
    config = replace(config, online=online)
    models = model_record("student", student), model_record("teacher", teacher)
    require_same_tokenizer(*models)
    recorded = read_artifact(data, "rollouts") if (data / MANIFEST_FILE).is_file() else None
    for author in recorded.manifest.models if recorded else ():
        require_same_tokenizer(author, models[0])
        if author.role == "teacher" and author.weights != models[1].weights:
            observer.warning(f"The rollouts come from another teacher ({author.name}) than the one that reads along.")
    prompts = Prompts(data, online.sampling.column, online.sampling.limit, online.sampling.system)
    _require_responses(online, find_method(config.method), recorded)
    most = online.sampling.max_prompt_tokens + online.sampling.max_new_tokens

    @contextmanager
    def open_(language_model: LanguageModel) -> Iterator[tuple[Source, list[int], HeldOut | None]]:
        if recorded is None:
            samples, dropped = samples_from_prompts(prompts, language_model, online.sampling.max_prompt_tokens)
            if dropped:
                observer.warning(
                    f"{dropped} prompts longer than {online.sampling.max_prompt_tokens} tokens are left out."
                )
        else:
            samples = samples_from_rollouts(recorded, online.sampling.limit)
        spread = online.teacher_device == "auto"
        device, device_map = (None, "auto") if spread else (online.teacher_device, None)
        reader = load_model(teacher, online.teacher_dtype, device, device_map)
        longest = longest_sequence(samples, online)
        require_context((language_model, reader), longest)
        with _speaker(student, reader, online.sampling, longest) as speaker:
            source = OnlineSource(samples, reader, speaker, online.student_fraction, online.teacher_fraction)
            learned, held = _split(source, config)
            answered = source.with_responses([samples[i] for i in held], language_model, (seed,))
            measured = OnlineSource(answered, reader, speaker, online.student_fraction) if held else None
            if online.replay:
                source = ReplaySource(samples, reader, speaker, ReplaySchedule(online.replay))
            yield source, learned, HeldOut(measured, range(len(held))) if measured else None

    parent = prompts.parent(output) if recorded is None else recorded.as_parent_of(output)
    return run_training(TrainingJob(*models, (parent,), most, open_), output, config, seed, observer, overwrite)


def _require_responses(online: OnlineConfig, objective: Method, recorded: Artifact | None) -> None:
    """Raise InputError when fresh answers or recorded ones are wanted and cannot be had, or had and not wanted."""
    if not objective.teacher:
        raise InputError(f"{objective.name} needs no teacher but its answers.", "Give --rollouts alone.")
    objective.require_fresh(online.student_fraction)
    objective.require_sampling(asdict(online.sampling))
    if objective.objective.policy_gradient_weight and online.student_fraction < 1:
        raise InputError(f"{objective.name} learns live from fresh answers alone.", "Give --lambda 1, or none.")
    if recorded is None and online.student_fraction < 1:
        or_fresh = ", or --lambda 1" if objective.fresh and not objective.replays else ""
        raise InputError(
            f"lambda is {online.student_fraction}, but there are no responses to keep for the other prompts.",
            f"Give --rollouts in place of --prompts{or_fresh}.",
        )
    if recorded is not None and online.student_fraction < 1:
        objective.require_authors(response_authors(recorded))
    if online.replay and world_size() > 1:
        raise InputError(f"{objective.name} keeps its replays in one process.", "Start one.")


def _resolved(online: OnlineConfig, precision: str, observer: Observer) -> OnlineConfig:
    """With the engine that will sample, in the precision of the student's forward."""
    engine = choose_engine(online.sampling)
    if engine == "vllm" and world_size() > 1:
        if online.sampling.engine == "vllm":
            raise InputError("vLLM serves one training process, not several.", "Leave out --engine vllm.")
        engine = "transformers"
    who = "Student and teacher answer together" if online.teacher_fraction else "The student answers"
    observer.info(f"{who} with {engine}.")
    dtype: DType = "bfloat16" if precision == "bfloat16" else "float32"
    return replace(online, sampling=replace(online.sampling, engine=engine, dtype=dtype))


def _speaker(
    student: str, teacher: LanguageModel, sampling: GenerateConfig, longest: int
) -> AbstractContextManager[ResponseSampler]:
    if sampling.engine == "transformers":
        return nullcontext(LocalSampler(sampling, teacher if sampling.policy == "teacher-mixed" else None))
    from tsdkd.stages.engines.online_vllm import open_vllm_sampler

    return open_vllm_sampler(student, sampling, longest)


def _split(source: Source, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Samples to learn from and samples to measure on. A prompt's own content decides, so rounds hold out the same."""
    learned: list[int] = []
    held: list[int] = []
    for i in range(len(source)):
        measured = config.held_out and random_uniform("held out", source.prompt_id(i)) < config.held_out
        (held if measured else learned).append(i)
    if config.held_out and not (learned and held):
        raise InputError(
            f"Held out of {len(source)} responses, {len(held)} would be measured on.",
            "Choose another --held-out, or more prompts.",
        )
    return learned, held
