"""The teacher of online training: loaded, or behind a server."""

from dataclasses import replace
from pathlib import Path

from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.data.scoring import report_padded_reading
from tsdkd.stages.data.served_online import ServedTeacher
from tsdkd.stages.models.device import require_device
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.record import model_record
from tsdkd.stages.observer import Observer
from tsdkd.stages.teacher_server.record import served_record
from tsdkd.stages.teacher_server.server import TeacherServer


def model_records(
    student: str, teacher: str | TeacherServer, chat: ChatConfig, output: Path
) -> tuple[ModelRecord, ModelRecord]:
    """The records of student and teacher."""
    learner = model_record("student", student, chat=chat)
    if isinstance(teacher, str):
        return learner, model_record("teacher", teacher)
    return learner, served_record(teacher, learner, output)


def with_signal(config: TrainConfig, online: OnlineConfig, teacher: str | TeacherServer) -> OnlineConfig:
    """The settings with the number of log-probabilities that a server gives; of a loaded teacher, unchanged.

    Raises InputError for an objective or an option that the teacher does not support.
    """
    if isinstance(teacher, str):
        if online.teacher_top_k is not None:
            raise InputError("--teacher-top-k needs a served teacher.", "Give --teacher-url, or leave it out.")
        if online.teacher_device not in {None, "auto"}:
            require_device(online.teacher_device)
        return online
    objective = config.objective
    if online.teacher_fraction or objective.policy_gradient_weight or objective.temperature != 1 or config.compile:
        raise InputError(
            "A served teacher gives its most likely tokens at temperature 1: no mixture, no policy gradient, no "
            "--compile and no other temperature.",
            "Leave these out, or load the teacher with --teacher.",
        )
    if online.teacher_device is not None:
        raise InputError("--teacher-device needs a loaded teacher.", "Leave it out, or leave out --teacher-url.")
    return replace(online, teacher_top_k=teacher.top_k)


def open_teacher(
    teacher: str | TeacherServer, config: TrainConfig, vocab: int, ends: list[int], observer: Observer
) -> LanguageModel | ServedTeacher:
    """The teacher, loaded or served, cut to the ids that student and teacher know."""
    if isinstance(teacher, str):
        return replace(_load_teacher(teacher, config, observer), shared_vocab=vocab, pair_end_ids=ends)
    return ServedTeacher(teacher, vocab)


def _load_teacher(name: str, config: TrainConfig, observer: Observer) -> LanguageModel:
    assert config.online is not None
    online = config.online
    spread = online.teacher_device == "auto"
    device, device_map = (None, "auto") if spread else (online.teacher_device, None)
    teacher = load_model(name, online.teacher_dtype, device, device_map, config.attention, observer)
    if config.micro_batch_tokens:
        report_padded_reading([teacher], observer)
    return teacher
