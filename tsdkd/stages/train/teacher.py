"""The teacher of online training, or several by name: loaded, or behind servers. The name of an only teacher is ""."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tsdkd.artifacts.manifest import ModelRecord, teacher_role
from tsdkd.core import SelectiveObjective
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.data.online_teachers import LoadedTeacher, OnlineTeacher, TeachersInTurn
from tsdkd.stages.data.scoring import report_padded_reading
from tsdkd.stages.data.served_teachers import ServedTeachers
from tsdkd.stages.models.device import require_device
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.record import model_record
from tsdkd.stages.observer import Observer
from tsdkd.stages.teacher_server.record import served_record
from tsdkd.stages.teacher_server.server import TeacherServer
from tsdkd.stages.train.trial import TriedObjective

Teachers = Mapping[str, str | TeacherServer]
"""The model of each teacher, or its server, by name."""


def model_records(student: str, teachers: Teachers, chat: ChatConfig, output: Path) -> tuple[ModelRecord, ...]:
    """The records of the student and of each teacher."""
    learner = model_record("student", student, chat=chat)
    records = (
        model_record(teacher_role(name), teacher)
        if isinstance(teacher, str)
        else served_record(teacher, learner, output, teacher_role(name))
        for name, teacher in teachers.items()
    )
    return learner, *records


def with_signal(config: TrainConfig, online: OnlineConfig, teachers: Teachers, tried: TriedObjective) -> OnlineConfig:
    """The settings with the number of log-probabilities that a server gives; of loaded teachers, unchanged.

    Raises InputError for an objective or an option that the teachers do not support.
    """
    if "" not in teachers and online.teacher_fraction:
        raise InputError(
            "Several teachers cannot sample in a mixture with the student: one of them is in memory.",
            "Give --teacher-fraction 0.",
        )
    server = next((teacher for teacher in teachers.values() if not isinstance(teacher, str)), None)
    if server is None:
        if online.teacher_top_k is not None:
            raise InputError("--teacher-top-k needs a served teacher.", "Give --teacher-url, or leave it out.")
        if online.teacher_device not in {None, "auto"}:
            require_device(online.teacher_device)
        return online
    objective = config.objective
    if isinstance(tried.objective, SelectiveObjective):
        tried.objective.require_signal("topk", top=server.top_k)
    tempered = tried.tempered or objective.temperature != 1
    if online.teacher_fraction or objective.policy_gradient_weight or tempered or config.compile:
        raise InputError(
            "A served teacher gives its most likely tokens at temperature 1: no mixture, no policy gradient, no "
            "--compile and no other temperature.",
            "Leave these out, or load the teacher with --teacher.",
        )
    if online.teacher_device is not None:
        raise InputError("--teacher-device needs a loaded teacher.", "Leave it out, or leave out --teacher-url.")
    return replace(online, teacher_top_k=server.top_k)


def require_served_length(teachers: Teachers, longest: int) -> None:
    """Raises InputError for a server that does not read sequences of `longest` tokens."""
    for teacher in teachers.values():
        if not isinstance(teacher, str):
            teacher.require_length(longest)


def open_teacher(
    teachers: Teachers, config: TrainConfig, vocab: int, ends: list[int], observer: Observer
) -> OnlineTeacher:
    """The teachers, loaded or served, cut to the ids that they and the student know; several are loaded in turn."""
    servers = {name: teacher for name, teacher in teachers.items() if not isinstance(teacher, str)}
    if servers:
        return ServedTeachers(servers, vocab)

    def load(name: str, observer: Observer) -> LanguageModel:
        teacher = replace(_load_teacher(str(teachers[name]), config, observer), shared_vocab=vocab, pair_end_ids=ends)
        if name or config.micro_batch_tokens:
            report_padded_reading([teacher], observer)
        return teacher

    return LoadedTeacher(load("", observer)) if "" in teachers else TeachersInTurn(load, observer)


def _load_teacher(name: str, config: TrainConfig, observer: Observer) -> LanguageModel:
    assert config.online is not None
    online = config.online
    spread = online.teacher_device == "auto"
    device, device_map = (None, "auto") if spread else (online.teacher_device, None)
    return load_model(name, online.teacher_dtype, device, device_map, config.attention, observer)
