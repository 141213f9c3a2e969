"""inspect: shows the tokens that the objective selects in one response, or in a whole artifact. Writes nothing.

Recorded scores are read without torch. Models are loaded for rollouts without scores, and for a student after training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core.adaptive_opener import WINDOW
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.inspect import LARGEST_GAP, LONGEST_OPENER, RANDOM, InspectConfig
from tsdkd.stages.config.recorded import recorded_objective
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.recorded_chat import chat_of_rollouts
from tsdkd.stages.data.turns import Mask, turn_lengths
from tsdkd.stages.inspect.aggregate import Aggregate, aggregate_scores
from tsdkd.stages.inspect.numpy_selection import (
    Array,
    ResponseSelection,
    entropy_gap,
    opener_fraction_chooser,
    opener_length,
    select_tokens,
    split_turns,
)
from tsdkd.stages.inspect.recorded import (
    ENTROPY_COLUMNS,
    ResponseScores,
    Rollout,
    RolloutsReader,
    ScoresReader,
    open_scores,
)
from tsdkd.stages.inspect.response import InspectedResponse, build_response
from tsdkd.stages.inspect.token_texts import TokenTexts, load_token_texts
from tsdkd.stages.observer import Observer, SilentObserver


@reading_inputs()
def inspect_scores(
    scores: Path,
    config: InspectConfig,
    rollouts: Path | None = None,
    checkpoint: Path | None = None,
    student: str | None = None,
    after: str | None = None,
    observer: Observer | None = None,
) -> InspectedResponse:
    """One scored response; the model `after` scores it again for comparison.

    A `checkpoint` that was trained on these scores sets the objective. The tokenizer of `student` decodes the tokens
    (None: the recorded student's). Raises InputError.
    """
    observer = observer or SilentObserver()
    rollouts_reader, scores_reader = open_scores(scores, rollouts)
    chat_of_rollouts(rollouts_reader.artifact, config.chat)
    objective = _objective(scores_reader, config, checkpoint, observer)
    texts = _load_texts(scores_reader, student, observer)
    index = _choose_index(rollouts_reader, scores_reader, config, objective, observer)
    rollout = rollouts_reader[index]
    before = scores_reader[rollout["sample_id"]]
    selection = _select(before, rollout, objective, _earlier_turns(rollouts_reader, scores_reader, index, objective))
    scores_after, teacher_name = None, scores_reader.teacher_name(rollout["sample_id"])
    if after:
        teacher = scores_reader.teacher(rollout["sample_id"])
        if teacher.served:
            raise InputError(
                f"A server read {teacher.name}, the teacher of these scores; --after needs it loaded.",
                "Give --teacher with its directory or hub id, in place of the scores.",
            )
        from tsdkd.stages.inspect.models import score_with_models

        recorded = scores_reader.artifact.manifest.config
        scoring = ScoreConfig(
            signal="ranks",
            k=objective.k,
            dtype=recorded["dtype"],
            attention=config.attention or recorded.get("attention"),
        )
        (scores_after,) = score_with_models(rollout, [after], teacher.name, scoring, observer)
    return build_response(rollout, texts, objective, selection, before, scores_after, after, teacher_name)


@reading_inputs()
def inspect_models(
    rollouts: Path,
    config: InspectConfig,
    student: str,
    teacher: str,
    after: str | None = None,
    observer: Observer | None = None,
) -> InspectedResponse:
    """One response of rollouts without scores; the models score it now. Raises InputError."""
    reader = RolloutsReader(read_artifact(rollouts, "rollouts", hashed=False))
    chat_of_rollouts(reader.artifact, config.chat)
    objective = config.objective(TSDKDConfig())
    if config.sample_id in {LARGEST_GAP, LONGEST_OPENER} or objective.opener == "adaptive":
        raise InputError(
            f"{LARGEST_GAP}, {LONGEST_OPENER} and the adaptive opener need scores.",
            "Run `tsdkd score` first, or choose a sample by its id and a number for --opener.",
        )
    rollout = reader[_index_by_id(reader, config)]

    from tsdkd.stages.inspect.models import score_with_models

    students = [student, after] if after else [student]
    scoring = ScoreConfig(signal="ranks", k=objective.k, attention=config.attention)
    before, *scores_after = score_with_models(rollout, students, teacher, scoring, observer or SilentObserver())
    selection = _select(before, rollout, objective)
    texts = load_token_texts(student)
    return build_response(rollout, texts, objective, selection, before, scores_after[0] if after else None, after)


@reading_inputs()
def inspect_all(
    scores: Path, config: InspectConfig, checkpoint: Path | None = None, observer: Observer | None = None
) -> Aggregate:
    """Statistics over all responses of a scores artifact; of conversations, it reads the masks of the rollouts.

    Raises InputError.
    """
    observer = observer or SilentObserver()
    if config.chat.is_set:
        chat_of_rollouts(open_scores(scores)[0].artifact, config.chat)
    reader = ScoresReader(read_artifact(scores, "scores", hashed=False))
    has_masks = "turns" in reader.artifact.manifest.summary
    masks_of = open_scores(scores)[0].masks if has_masks else _no_masks
    objective = _objective(reader, config, checkpoint, observer)
    with observer.progress("scores read", len(reader), "responses") as advance:
        return aggregate_scores(reader, masks_of, objective, advance)


def _no_masks(_: str) -> dict[str, Mask]:
    """For scores without conversations, whose rollouts are not read."""
    return {}


def _objective(scores: ScoresReader, config: InspectConfig, checkpoint: Path | None, observer: Observer) -> TSDKDConfig:
    """The objective of a checkpoint that was trained on these scores, else the paper's; `config` overrides both."""
    recorded = TSDKDConfig()
    if checkpoint is not None and (checkpoint / MANIFEST_FILE).is_file():
        manifest = load_manifest(checkpoint)
        if manifest.config.get("objective") == {}:
            method = manifest.config["method"]
            observer.info(f"{checkpoint} was trained with the selection of {method}; inspect shows that of TSD-KD.")
        elif scores.artifact.fingerprint in {parent.fingerprint for parent in manifest.parents}:
            recorded = recorded_objective(manifest)
            observer.info(f"Settings without an option are those that trained {checkpoint}.")
        else:
            observer.info(f"{checkpoint} was not trained on these scores; settings without an option are the paper's.")
    if recorded.released:
        terms = ", ".join(recorded.released)
        observer.info(f"Training used the released code's {terms}; the selection shown is the paper's.")
    if recorded.temperature != 1:
        observer.info(f"Entropies are at temperature 1; training divides logits by {recorded.temperature:g}.")
    return config.objective(recorded, scores.k)


def _load_texts(scores: ScoresReader, student: str | None, observer: Observer) -> TokenTexts:
    """Token texts of `student`, else of the recorded student."""
    recorded = scores.model("student")
    texts = load_token_texts(student or recorded.name)
    if student and texts.fingerprint != recorded.tokenizer:
        observer.info(f"The tokenizer of {student} differs from the recorded one; texts may be wrong.")
    return texts


def _choose_index(
    rollouts: RolloutsReader,
    scores: ScoresReader,
    config: InspectConfig,
    objective: TSDKDConfig,
    observer: Observer,
) -> int:
    if config.sample_id == LARGEST_GAP:
        return _index_of_largest(rollouts, scores, entropy_gap, observer)
    if config.sample_id == LONGEST_OPENER:
        choose_fraction = opener_fraction_chooser(objective)
        return _index_of_largest(
            rollouts,
            scores,
            lambda student, teacher: opener_length(student, choose_fraction(student, teacher)),
            observer,
        )
    return _index_by_id(rollouts, config)


def _index_by_id(rollouts: RolloutsReader, config: InspectConfig) -> int:
    if config.sample_id == RANDOM:
        return Random(config.seed).randrange(len(rollouts))
    return rollouts.index_of(config.sample_id)


def _index_of_largest(
    rollouts: RolloutsReader, scores: ScoresReader, measure: Callable[[Array, Array], float], observer: Observer
) -> int:
    """The response of the turn with the largest `measure(student_entropy, teacher_entropy)`; the first wins ties."""
    largest, sample_of_largest = float("-inf"), ""
    with observer.progress("entropies read", len(scores), "responses") as advance:
        for batch in scores.stream(list(ENTROPY_COLUMNS), rollouts.masks):
            samples = [name for name, lengths in zip(batch.sample_ids, batch.turns, strict=True) for _ in lengths]
            turns = zip(*(batch.split(batch.columns[name]) for name in ENTROPY_COLUMNS), strict=True)
            for sample_id, (student, teacher) in zip(samples, turns, strict=True):
                value = measure(student, teacher)
                if value > largest:
                    largest, sample_of_largest = value, sample_id
            advance(len(batch.turns))
    return rollouts.index_of(sample_of_largest)


def _earlier_turns(
    rollouts: RolloutsReader, scores: ScoresReader, index: int, objective: TSDKDConfig
) -> list[tuple[Array, Array]]:
    """Both entropies of the turns before a response that an adaptive opener depends on."""
    before = WINDOW - 1 if objective.opener == "adaptive" else 0
    earlier = map(rollouts.__getitem__, range(max(0, index - before), index))
    return [turn for rollout in earlier for turn in _turns(scores[rollout["sample_id"]], rollout)]


def _turns(scores: ResponseScores, rollout: Rollout) -> list[tuple[Array, Array]]:
    """Both entropies of each turn of a response."""
    lengths = turn_lengths(len(scores.student_entropy), rollout["response_mask"])
    entropies = (split_turns(values, lengths) for values in (scores.student_entropy, scores.teacher_entropy))
    return list(zip(*entropies, strict=True))


def _select(
    scores: ResponseScores, rollout: Rollout, objective: TSDKDConfig, earlier: Sequence[tuple[Array, Array]] = ()
) -> ResponseSelection:
    """The selected tokens of a response; `earlier`: both entropies of turns before it."""
    choose_fraction, turns = opener_fraction_chooser(objective), _turns(scores, rollout)
    fractions = [choose_fraction(*turn) for turn in [*earlier, *turns]][len(earlier) :]
    lengths = [len(student) for student, _ in turns]
    return select_tokens(scores.student_entropy, scores.teacher_entropy, lengths, objective, fractions)
