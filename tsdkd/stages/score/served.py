"""score with served teachers: rollouts -> scores. The student is read here, each teacher by its server.

One process sends requests, as many at a time as the user allows.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest, teacher_role
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.config.score import ScoreConfig, require_candidates
from tsdkd.stages.data.readable import require_readable
from tsdkd.stages.data.recorded_chat import chat_of_rollouts
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS, sequence_lengths
from tsdkd.stages.data.served_scoring import MIN_CAPTURED_MASS, too_little_mass
from tsdkd.stages.engines.choice import require_engine_options
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.parallel.choice import is_parallel, require_parallel
from tsdkd.stages.parallel.part_files import open_destination
from tsdkd.stages.parallel.pool import OwnProcess
from tsdkd.stages.parallel.tasks import Handler
from tsdkd.stages.score.loop import Scoring
from tsdkd.stages.score.manifest import scores_manifest
from tsdkd.stages.score.pairs import NO_HEAD, ScoringPair, ServedPair, load_reading_model
from tsdkd.stages.score.scorer import opened_scorer
from tsdkd.stages.teacher_server.record import served_record
from tsdkd.stages.teacher_server.server import TeacherServer, open_servers


@reading_inputs()
def score_served(
    rollouts: Path,
    student: str,
    urls: str | Mapping[str, str],
    names: str | Mapping[str, str] | None,
    output: Path,
    config: ScoreConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Score rollouts with a student and a teacher that a server serves, or with several by name.

    `urls`: of each teacher's server; `names`: of its model there, needed where a server serves several.

    Raises InputError before anything is written, TsdkdError when a server fails; what is complete is kept.
    """
    observer = observer or SilentObserver()
    _require_supported(config)
    parent, spec = read_artifact(rollouts, "rollouts"), load_spec(student)
    require_attention(config.attention, (student,))
    require_readable(parent, [spec])
    require_candidates(config, spec.vocab)
    longest = max(max(sequence_lengths(parent.read_part(part, LENGTH_COLUMNS))) for part in parent.tables)
    with open_servers(
        urls, names, spec.tokenizer, vocab=spec.vocab, top_k=config.top_k, k=config.k, observer=observer
    ) as servers:
        for server in servers.values():
            server.require_length(longest)
        manifest = _manifest(parent, student, servers, output, config, observer)
        with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(writer.path):
            if writer.complete:
                observer.info(f"{output} is complete: nothing to do.")
                return writer.artifact
            load_student = cache(partial(load_reading_model, student, spec.vocab, config, observer))

            @contextmanager
            def open_pair(teacher: str, _: pa.Table) -> Iterator[ScoringPair]:
                yield ServedPair(load_student(), servers[teacher], config)

            with open_destination(writer) as destination, OwnProcess(observer) as pool:

                def open_scorer(_: Observer) -> AbstractContextManager[Handler]:
                    return opened_scorer(open_pair, config, destination)

                scores = Scoring(
                    parent, list(servers), lambda _: NO_HEAD, open_scorer, pool, writer, config, observer
                ).run()
        _warn_of_captured_mass(scores.manifest.summary, config, observer)
        return scores


def _warn_of_captured_mass(summary: dict[str, Any], config: ScoreConfig, observer: Observer) -> None:
    """Warn of a teacher whose responses together have less captured mass than its sample must have."""
    for name, values in summary.get("teachers", {"": summary}).items():
        if values.get("captured_mass", 1.0) < MIN_CAPTURED_MASS:
            observer.warning(f"{too_little_mass(values['captured_mass'], config.top_k, name)} The scores are kept.")


def _require_supported(config: ScoreConfig) -> None:
    if config.signal not in {"topk", "ranks"}:
        raise InputError(
            f"A server gives no hidden states, which --signal {config.signal} needs.",
            "Give --signal topk, or --signal ranks.",
        )
    if config.engine != "transformers":
        raise InputError(
            f"With --teacher-url, transformers reads the student, not {config.engine}.", "Leave out --engine."
        )
    require_engine_options(config.engine, config)
    require_parallel("score", config)
    if is_parallel(config):
        raise InputError("With --teacher-url, one process sends the requests.", "Leave out --data-parallel and --ray.")


def _manifest(
    parent: Artifact,
    student: str,
    servers: Mapping[str, TeacherServer],
    output: Path,
    config: ScoreConfig,
    observer: Observer,
) -> Manifest:
    chat = chat_of_rollouts(parent, config.chat) if parent.manifest.models[0].role == "student" else None
    learner = model_record("student", student, chat=chat)
    records = (served_record(server, learner, output, teacher_role(name)) for name, server in servers.items())
    manifest = scores_manifest(parent, (learner, *records), servers, output, config, observer)
    return replace(manifest, engine="server")
