"""The manifest of scores. Models and rollouts are checked before anything is written."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsdkd.artifacts.manifest import Manifest, ModelRecord
from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.config.generate import GIVEN
from tsdkd.stages.config.score import ScoreConfig, recorded_scoring
from tsdkd.stages.data.rollout_teachers import column_of_teachers
from tsdkd.stages.models.record import library_versions, require_same_template, require_same_tokenizer
from tsdkd.stages.observer import Observer
from tsdkd.stages.score.units import divide_rollouts


def scores_manifest(
    rollouts: Artifact,
    models: tuple[ModelRecord, ...],
    teachers: Mapping[str, Any],
    output: Path,
    config: ScoreConfig,
    observer: Observer,
) -> Manifest:
    """The manifest of scores; `models`: the student and the `teachers`, in their order.

    Warns of other models that sampled the rollouts, and of teachers without a response. Raises InputError for models
    of different tokenizers, a changed chat template, and a response whose teacher is not among `teachers`.
    """
    learner, *others = models
    for teacher in others:
        require_same_tokenizer(learner, teacher)
    _check_authors(rollouts, models, observer)
    config = replace(config, teacher_by=column_of_teachers(rollouts, teachers, config.teacher_by))
    read = {unit.teacher for unit in divide_rollouts(rollouts, teachers, config.teacher_by)}
    for name in [name for name in teachers if name not in read]:
        observer.warning(f"No response has the teacher {name}.")
    return Manifest(
        kind="scores",
        config=recorded_scoring(config),
        seed=rollouts.manifest.seed,
        parents=(rollouts.as_parent_of(output),),
        models=models,
        libraries=library_versions(),
    )


def _check_authors(rollouts: Artifact, models: tuple[ModelRecord, ...], observer: Observer) -> None:
    """Compare the models that sampled the rollouts with those of the same roles that score them now."""
    by_role, authors = {model.role: model for model in models}, rollouts.manifest.models
    weights, policy = {model.weights for model in models}, rollouts.manifest.config["policy"]
    for author in authors:
        require_same_tokenizer(author, models[0])
        scorer = by_role.get(author.role)
        if scorer and scorer.served:
            continue  # its weights are not known
        if scorer and author is authors[0]:
            require_same_template(author, scorer)
        if policy != GIVEN and author.weights not in ({scorer.weights} if scorer else weights):
            another = f"nother {author.role.replace(':', ' ', 1)}"
            ended = policy == "student" and author.teacher_name is not None  # it gave its end tokens alone
            which = f"The end tokens of a{another} end the responses" if ended else f"A{another} sampled the rollouts"
            observer.warning(f"{which}: {author.name}.")
