"""score: rollouts -> scores. Both models read each response once; the scores hold the values that training needs.

Several teachers are loaded one after the other, beside the student; each reads the responses of its own prompts.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest, teacher_role, teachers_by_name
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.core import Head
from tsdkd.errors import InputError
from tsdkd.stages.config.score import ScoreConfig, require_candidates
from tsdkd.stages.data.offline import TEACHER_END_IDS
from tsdkd.stages.data.readable import require_readable
from tsdkd.stages.data.recorded_chat import chat_of_rollouts
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS, sequence_lengths
from tsdkd.stages.engines.choice import engine_version, require_engine_options, require_vllm
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.model_size import head_shape
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.spec import load_config, load_spec
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.parallel.choice import is_parallel, open_pool, require_parallel
from tsdkd.stages.parallel.part_files import open_destination
from tsdkd.stages.score.loop import Scoring
from tsdkd.stages.score.manifest import scores_manifest
from tsdkd.stages.score.scorer import OpenScorer


@reading_inputs()
def score(
    rollouts: Path,
    student: str,
    teachers: str | Mapping[str, str],
    output: Path,
    config: ScoreConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Score rollouts with a student and a teacher, or with several by name.

    Raises InputError before anything is written, TsdkdError when the disk is too small.
    """
    observer = observer or SilentObserver()
    by_name = teachers_by_name(teachers)
    require_parallel("score", config)
    manifest = _manifest(rollouts, student, by_name, output, config, observer)
    with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(writer.path):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        parent = read_artifact(rollouts, "rollouts", hashed=False)
        vocab = min(load_spec(name).vocab for name in (student, *by_name.values()))
        longest = max(max(sequence_lengths(parent.read_part(part, LENGTH_COLUMNS))) for part in parent.tables)
        with (
            open_destination(writer) as destination,
            open_pool(config, config.tensor_parallel, manifest.models, observer) as pool,
        ):
            return Scoring(
                parent,
                list(by_name),
                lambda name: _planned_head(by_name[name], vocab, config),
                OpenScorer(student, by_name, vocab, longest, config, destination),
                pool,
                writer,
                config,
                observer,
            ).run()


def _manifest(
    rollouts: Path, student: str, teachers: dict[str, str], output: Path, config: ScoreConfig, observer: Observer
) -> Manifest:
    """The manifest of the scores. Raises InputError where models, rollouts and config do not fit together."""
    require_engine_options(config.engine, config)
    if config.engine == "vllm":
        require_vllm()
    if config.device_map != "one" and is_parallel(config):
        raise InputError(
            "--device-map spreads the models of one process over all GPUs.",
            "Leave it out, or leave out --data-parallel and --ray.",
        )
    parent = read_artifact(rollouts, "rollouts")
    chat, template_role = chat_of_rollouts(parent, config.chat), parent.manifest.models[0].role
    names = {"student": student} | {teacher_role(name): teacher for name, teacher in teachers.items()}
    models = tuple(
        model_record(role, name, chat=chat if role == template_role else None) for role, name in names.items()
    )
    require_attention(config.attention, names.values())
    specs = [load_spec(name) for name in names.values()]
    require_candidates(config, min(spec.vocab for spec in specs))
    require_readable(parent, specs)
    manifest = scores_manifest(parent, models, teachers, output, config, observer)
    ends = sorted({end for spec in specs[1:] for end in spec.end_ids} - {*specs[0].end_ids})
    return replace(
        manifest,
        config=manifest.config | ({TEACHER_END_IDS: ends} if ends else {}),
        engine=config.engine,
        libraries=manifest.libraries | (engine_version("vllm") if config.engine == "vllm" else {}),
    )


def _planned_head(teacher: str, vocab: int, config: ScoreConfig) -> Head:
    """The shape and dtype of a teacher's head, without its values."""
    _, width = head_shape(load_config(teacher))
    dtype = auto_dtype(load_config(teacher), default_device()) if config.dtype == "auto" else config.dtype
    return Head(torch.empty(vocab, width, dtype=getattr(torch, dtype), device="meta"))
