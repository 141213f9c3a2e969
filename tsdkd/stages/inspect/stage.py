"""inspect: what the method does to one response, token by token, and over a whole artifact. Writes nothing.

What `score` recorded is looked at without torch; models are loaded where nothing is recorded, or to compare with a
trained one.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tsdkd.artifacts.manifest import MANIFEST_FILE, load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core.adaptive import WINDOW
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.inspect import LARGEST_GAP, LONGEST_OPENER, RANDOM, InspectConfig
from tsdkd.stages.inspect.aggregate import Aggregate, aggregate
from tsdkd.stages.inspect.recorded import ENTROPIES, RecordedRollouts, RecordedScores, open_recorded
from tsdkd.stages.inspect.response import Response, assemble
from tsdkd.stages.inspect.selection import Array, fraction_chooser, gap, opener_length, select
from tsdkd.stages.inspect.token_texts import TokenTexts, load_token_texts
from tsdkd.stages.observer import Observer, SilentObserver


def inspect_scores(
    scores: Path,
    config: InspectConfig,
    rollouts: Path | None = None,
    checkpoint: Path | None = None,
    student: str | None = None,
    after: str | None = None,
    observer: Observer | None = None,
) -> Response:
    """One response as it was scored; `after`: a model that reads it, too, to compare.

    A `checkpoint` made from these scores says what was selected. `student`: whose tokenizer shows the tokens.
    Raises InputError.
    """
    observer = observer or SilentObserver()
    answered, scored = open_recorded(scores, rollouts)
    objective = _objective(scored, config, checkpoint, observer)
    texts = _texts(scored, student, observer)
    index = _chosen(answered, scored, config, objective, observer)
    row, view = answered[index], scored[index]
    selection = select(view.student_entropy, view.teacher_entropy, objective, _fraction(scored, index, objective))
    later = None
    if after:
        from tsdkd.stages.inspect.models import model_views

        dtype = scored.artifact.manifest.config["dtype"]
        (later,) = model_views(row, [after], scored.model("teacher").name, objective.k, dtype)
    return assemble(row, texts, objective, selection, view, later, after)


def inspect_models(
    rollouts: Path, config: InspectConfig, student: str, teacher: str, after: str | None = None
) -> Response:
    """One response of rollouts that are not scored, read by both models. Raises InputError."""
    answered, objective = (
        RecordedRollouts(read_artifact(rollouts, "rollouts", hashed=False)),
        config.objective(TSDKDConfig()),
    )
    if config.sample_id in {LARGEST_GAP, LONGEST_OPENER} or objective.opener == "adaptive":
        raise InputError(
            "The largest gap, the longest opener and the adaptive opener are known of scores alone.",
            "Run `tsdkd score` first, or choose a sample by its id and --opener by a share.",
        )
    row = answered[_index(answered, config)]

    from tsdkd.stages.inspect.models import model_views

    before, *later = model_views(row, [student, *([after] if after else [])], teacher, objective.k)
    fraction = fraction_chooser(objective)(before.student_entropy, before.teacher_entropy)
    selection = select(before.student_entropy, before.teacher_entropy, objective, fraction)
    return assemble(row, load_token_texts(student), objective, selection, before, later[0] if later else None, after)


def inspect_all(
    scores: Path, config: InspectConfig, checkpoint: Path | None = None, observer: Observer | None = None
) -> Aggregate:
    """What is selected in all responses of an artifact. Raises InputError."""
    observer = observer or SilentObserver()
    scored = RecordedScores(read_artifact(scores, "scores", hashed=False))
    objective = _objective(scored, config, checkpoint, observer)
    with observer.progress("scores read", len(scored), "responses") as advance:
        return aggregate(scored, objective, advance)


def _objective(
    scores: RecordedScores, config: InspectConfig, checkpoint: Path | None, observer: Observer
) -> TSDKDConfig:
    """As the checkpoint was trained, if it was made from these scores; else the paper's; with what is given."""
    recorded = TSDKDConfig()
    if checkpoint is not None and (checkpoint / MANIFEST_FILE).is_file():
        manifest = load_manifest(checkpoint)
        if scores.artifact.fingerprint in {parent.fingerprint for parent in manifest.parents}:
            recorded = TSDKDConfig(**manifest.config["objective"])
            observer.info(f"What is taught is as {checkpoint} was trained, where no option says otherwise.")
        else:
            observer.info(f"{checkpoint} was not made from these scores: what is taught is as in the paper.")
    if recorded.released:
        observer.info(f"It was trained with the released code's {', '.join(recorded.released)}; the paper's are shown.")
    if recorded.temperature != 1:
        observer.info(f"Entropies are those at temperature 1; training divides logits by {recorded.temperature:g}.")
    return config.objective(recorded, scores.k)


def _texts(scores: RecordedScores, student: str | None, observer: Observer) -> TokenTexts:
    """Of the `student` named here, else of the one that was recorded."""
    recorded = scores.model("student")
    texts = load_token_texts(student or recorded.name)
    if student and texts.fingerprint != recorded.tokenizer:
        observer.info(f"The tokenizer of {student} is another than the recorded one: texts may be wrong.")
    return texts


def _chosen(
    rollouts: RecordedRollouts,
    scores: RecordedScores,
    config: InspectConfig,
    objective: TSDKDConfig,
    observer: Observer,
) -> int:
    if config.sample_id == LARGEST_GAP:
        return _first_largest(scores, gap, observer)
    if config.sample_id == LONGEST_OPENER:
        fraction = fraction_chooser(objective)
        return _first_largest(scores, lambda s, t: opener_length(s, fraction(s, t)), observer)
    return _index(rollouts, config)


def _index(rollouts: RecordedRollouts, config: InspectConfig) -> int:
    if config.sample_id == RANDOM:
        return Random(config.seed).randrange(len(rollouts))
    return rollouts.find(config.sample_id)


def _first_largest(scores: RecordedScores, measure: Callable[[Array, Array], float], observer: Observer) -> int:
    """Of all responses, by what their entropies (student's, teacher's) measure."""
    best, found, seen = float("-inf"), 0, 0
    with observer.progress("entropies read", len(scores), "responses") as advance:
        for batch in scores.stream(list(ENTROPIES)):
            rows = zip(*(batch.split(batch.columns[name]) for name in ENTROPIES), strict=True)
            for index, (student, teacher) in enumerate(rows, seen):
                value = measure(student, teacher)
                if value > best:
                    best, found = value, index
            seen += len(batch.lengths)
            advance(len(batch.lengths))
    return found


def _fraction(scores: RecordedScores, index: int, objective: TSDKDConfig) -> float:
    """The opener's c; where it is adaptive, the responses before this one count, too."""
    choose, before = fraction_chooser(objective), WINDOW - 1 if objective.opener == "adaptive" else 0
    nearest = [scores[i] for i in range(max(0, index - before), index + 1)]
    return [choose(view.student_entropy, view.teacher_entropy) for view in nearest][-1]
