"""One response read by models, where nothing is recorded of it: before training, after it, or both. Loads torch."""

from collections.abc import Sequence
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.data.scoring import score_responses
from tsdkd.stages.inspect.recorded import RecordedView, Row
from tsdkd.stages.models.load import LanguageModel, load_model


def model_views(row: Row, students: Sequence[str], teacher: str, k: int, dtype: DType = "auto") -> list[RecordedView]:
    """What each student sees in a row of rollouts, beside the teacher. Raises InputError where tokenizers differ."""
    config = ScoreConfig(signal="ranks", k=k, dtype=dtype)
    reader = load_model(teacher, dtype)
    found = []
    for name in students:
        student = load_model(name, dtype)
        _require_same_tokenizer(student, reader)
        found.append(_view(score_responses([row], (student, reader), config)[0]))
        del student  # the next one takes its memory
    return found


def _view(row: dict[str, Any]) -> RecordedView:
    names = ("student_entropy", "teacher_entropy", "candidates", "ranks")
    return RecordedView(*(row[name].numpy() for name in names))


def _require_same_tokenizer(student: LanguageModel, teacher: LanguageModel) -> None:
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(
            f"{student.name} and {teacher.name} have different tokenizers.", "Choose two models of one family."
        )
