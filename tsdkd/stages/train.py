"""train: rollouts + scores -> checkpoint, the teacher absent; or prompts + a live teacher -> checkpoint.

Which objective, is a name of `objectives`; one of them needs the rollouts alone.

Everything is per response, then averaged over the optimizer batch's responses: micro-batches and padding do not change
the update. Killed at any moment, a run continues from its last saved step and ends with the same weights.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from tsdkd.artifacts import MANIFEST, Artifact, Model, read
from tsdkd.errors import InputError
from tsdkd.stages.config import DType, GenerateConfig, LiveConfig, TrainConfig
from tsdkd.stages.models import LanguageModel, describe, load_model, require_same_tokenizer
from tsdkd.stages.objectives import Objective, find
from tsdkd.stages.reporter import Reporter, Silent
from tsdkd.stages.rollouts.engines import choose
from tsdkd.stages.rollouts.prompts import Prompts
from tsdkd.stages.samples.heldout import HeldOut
from tsdkd.stages.samples.sources import Source
from tsdkd.stages.samples.staged import AnsweredSamples, StagedSamples, authors
from tsdkd.stages.training.learning import Job, carry_out, precision_of
from tsdkd.stages.training.live import Here, LiveSamples, Speaker, from_prompts, from_rollouts, number, require_room
from tsdkd.stages.training.replay import ReplayedSamples, Schedule


def train(
    rollouts: Path,
    scores: Path | None,
    student: str,
    output: Path,
    config: TrainConfig,
    seed: int = 0,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Distil staged scores into the student, or the responses alone where the objective needs no more.

    Raises InputError before anything is written, KeyboardInterrupt after an interrupted step was finished and saved,
    TsdkdError when the loss is not finite.
    """
    reporter = reporter or Silent()
    start = describe("student", student)
    samples = AnsweredSamples(rollouts) if scores is None else _scored(rollouts, scores, start, config, reporter)
    objective = find(config.method)
    if scores is None and objective.teacher:
        raise InputError(f"{config.method} needs the teacher's view of the responses.", "Run `tsdkd score` first.")
    if scores is not None and not objective.teacher:
        raise InputError(f"{config.method} learns from the teacher's responses alone.", "Leave out the scores.")
    if scores is None and config.compile:
        raise InputError(f"{config.method} has nothing to compile.", "Leave out --compile.")
    objective.require_authors(authors(samples.rollouts))
    objective.require_sampling(samples.rollouts.manifest.config)
    if objective.loss.long_range_weight:
        _require_samplers(samples)
    require_same_tokenizer(start, samples.teacher)
    learned, held = _split(samples, config)
    job = Job(
        student=start,
        teacher=samples.teacher,
        parents=tuple(parent.as_parent_of(output) for parent in samples.parents),
        longest=max(samples.length(i) for i in learned),
        open=lambda _: nullcontext((samples, learned, HeldOut(samples, held) if held else None)),
    )
    return carry_out(job, output, config, seed, reporter, overwrite)


def _scored(rollouts: Path, scores: Path, start: Model, config: TrainConfig, reporter: Reporter) -> StagedSamples:
    samples = StagedSamples(rollouts, scores)
    samples.decoder.require(config.objective)
    if config.compile and samples.decoder.head is None:
        raise InputError(
            f"--compile needs the teacher's hidden states, but these scores hold {samples.decoder.signal!r}.",
            "Leave out --compile, or score with --signal hidden.",
        )
    scored = samples.scores.manifest.model("student")
    require_same_tokenizer(start, scored)
    if start.weights != scored.weights:
        reporter.warn(f"The student is another than the one that was scored ({scored.name}).")
    return samples


def _require_samplers(samples: AnsweredSamples) -> None:
    """Raise InputError when the models that were scored are not those that sampled."""
    *_, last = samples.parents
    scored = {model.role: model for model in last.manifest.models}
    for sampler in samples.rollouts.manifest.models:
        if sampler.weights != scored[sampler.role].weights:
            raise InputError(
                f"These scores are of another {sampler.role} than the one that sampled ({sampler.name}).",
                f"Score with --{sampler.role} {sampler.name}.",
            )


def train_live(
    data: Path,
    student: str,
    teacher: str,
    output: Path,
    config: TrainConfig,
    seed: int = 0,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Distil a teacher that reads along: the student answers a share `config.live.on_policy` of prompts as it learns.

    `data`: a prompts file, or a rollouts artifact whose responses the other prompts keep. Raises as `train`.
    """
    reporter = reporter or Silent()
    assert config.live is not None
    live = _resolved(config.live, precision_of(config), reporter)
    config = replace(config, live=live)
    models = describe("student", student), describe("teacher", teacher)
    require_same_tokenizer(*models)
    recorded = read(data, "rollouts") if (data / MANIFEST).is_file() else None
    for author in recorded.manifest.models if recorded else ():
        require_same_tokenizer(author, models[0])
        if author.role == "teacher" and author.weights != models[1].weights:
            reporter.warn(f"The rollouts come from another teacher ({author.name}) than the one that reads along.")
    prompts = Prompts(data, live.sampling.column, live.sampling.limit, live.sampling.system)
    _require_responses(live, find(config.method), recorded)
    most = live.sampling.max_prompt_tokens + live.sampling.max_new_tokens

    @contextmanager
    def open_(language_model: LanguageModel) -> Iterator[tuple[Source, list[int], HeldOut | None]]:
        if recorded is None:
            samples, dropped = from_prompts(prompts, language_model, live.sampling.max_prompt_tokens)
            if dropped:
                reporter.warn(f"{dropped} prompts longer than {live.sampling.max_prompt_tokens} tokens are left out.")
        else:
            samples = from_rollouts(recorded, live.sampling.limit)
        spread = live.teacher_device == "auto"
        device, device_map = (None, "auto") if spread else (live.teacher_device, None)
        reader = load_model(teacher, live.teacher_dtype, device, device_map)
        longest = require_room(samples, (language_model, reader), live)
        with _speaker(student, reader, live.sampling, longest) as speaker:
            source = LiveSamples(samples, reader, speaker, live.on_policy, live.teacher_share)
            learned, held = _split(source, config)
            answered = source.answered([samples[i] for i in held], language_model, (seed,))
            measured = LiveSamples(answered, reader, speaker, live.on_policy) if held else None
            if live.replay:
                source = ReplayedSamples(samples, reader, speaker, Schedule(live.replay))
            yield source, learned, HeldOut(measured, range(len(held))) if measured else None

    parent = prompts.parent(output) if recorded is None else recorded.as_parent_of(output)
    return carry_out(Job(*models, (parent,), most, open_), output, config, seed, reporter, overwrite)


def _require_responses(live: LiveConfig, objective: Objective, recorded: Artifact | None) -> None:
    """Raise InputError when fresh answers or recorded ones are wanted and cannot be had, or had and not wanted."""
    if not objective.teacher:
        raise InputError(f"{objective.name} needs no teacher but its answers.", "Give --rollouts alone.")
    objective.require_fresh(live.on_policy)
    objective.require_sampling(asdict(live.sampling))
    if objective.loss.long_range_weight and live.on_policy < 1:
        raise InputError(f"{objective.name} learns live from fresh answers alone.", "Give --lambda 1, or none.")
    if recorded is None and live.on_policy < 1:
        or_fresh = ", or --lambda 1" if objective.fresh and not objective.replays else ""
        raise InputError(
            f"lambda is {live.on_policy}, but there are no responses to keep for the other prompts.",
            f"Give --rollouts in place of --prompts{or_fresh}.",
        )
    if recorded is not None and live.on_policy < 1:
        objective.require_authors(authors(recorded))
    if live.replay and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{objective.name} keeps its replays in one process.", "Start one.")


def _resolved(live: LiveConfig, precision: str, reporter: Reporter) -> LiveConfig:
    """With the engine that will sample, in the precision of the student's forward."""
    engine = choose(live.sampling)
    if engine == "vllm" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if live.sampling.engine == "vllm":
            raise InputError("vLLM serves one training process, not several.", "Leave out --engine vllm.")
        engine = "transformers"
    who = "Student and teacher answer together" if live.teacher_share else "The student answers"
    reporter.say(f"{who} with {engine}.")
    dtype: DType = "bfloat16" if precision == "bf16" else "float32"
    return replace(live, sampling=replace(live.sampling, engine=engine, dtype=dtype))


def _speaker(
    student: str, teacher: LanguageModel, sampling: GenerateConfig, longest: int
) -> AbstractContextManager[Speaker]:
    if sampling.engine == "transformers":
        return nullcontext(Here(sampling, teacher if sampling.policy == "teacher-mixed" else None))
    from tsdkd.stages.training.served import served

    return served(student, sampling, longest)


def _split(source: Source, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Samples to learn from and samples to measure on. A prompt's own content decides, so rounds hold out the same."""
    learned: list[int] = []
    held: list[int] = []
    for i in range(len(source)):
        measured = config.held_out and number("held out", source.prompt_of(i)) < config.held_out * 2**60
        (held if measured else learned).append(i)
    if config.held_out and not (learned and held):
        raise InputError(
            f"Held out of {len(source)} responses, {len(held)} would be measured on.",
            "Choose another --held-out, or more prompts.",
        )
    return learned, held
