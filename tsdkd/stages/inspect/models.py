"""Scores one response with loaded models, for rollouts without scores or a student after training. Loads torch."""

from collections.abc import Sequence

from tsdkd.errors import InputError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.scoring import score_responses
from tsdkd.stages.inspect.recorded import ResponseScores, Rollout
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.language_model import LanguageModel, share_vocab
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.vocabulary import require_known_ids
from tsdkd.stages.observer import Observer

COLUMNS = ("student_entropy", "teacher_entropy", "candidates", "ranks")


def score_with_models(
    rollout: Rollout,
    students: Sequence[str],
    teacher: str,
    config: ScoreConfig,
    observer: Observer,
) -> list[ResponseScores]:
    """The scores of one rollout by each student and the teacher. Raises InputError if tokenizers differ."""
    require_attention(config.attention, (*students, teacher))
    teacher_model = load_model(teacher, config.dtype, attention=config.attention, observer=observer)
    scores = []
    for name in students:
        student_model = load_model(name, config.dtype, attention=config.attention, observer=observer)
        _require_same_tokenizer(student_model, teacher_model)
        pair = student_model, teacher_model = share_vocab(student_model, teacher_model)
        ids = rollout["prompt_ids"] + rollout["response_ids"]
        require_context(pair, len(ids), recorded=True)
        for model in pair:
            require_known_ids(model.name, model.vocab, max(ids))
        (columns,) = score_responses([rollout], pair, config)
        scores.append(ResponseScores(*(columns[column].numpy() for column in COLUMNS)))
        del student_model  # frees the memory for the next student
    return scores


def _require_same_tokenizer(student: LanguageModel, teacher: LanguageModel) -> None:
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(
            f"{student.name} and {teacher.name} have different tokenizers.", "Choose two models of one family."
        )
