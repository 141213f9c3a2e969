"""inspect: what the method does to one response, token by token, and over a whole artifact. Writes nothing.

What `score` recorded is looked at without torch; models are loaded where nothing is recorded, or to compare with a
trained one.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tsdkd.artifacts import MANIFEST, load_manifest, read
from tsdkd.core.adaptive import WINDOW
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config import LARGEST_GAP, LONGEST_OPENER, RANDOM, InspectConfig
from tsdkd.stages.inspection.aggregate import Aggregate, aggregate
from tsdkd.stages.inspection.reading import ENTROPIES, Rollouts, Scores, open_recorded
from tsdkd.stages.inspection.response import Response, assemble
from tsdkd.stages.inspection.rules import Array, fraction_chooser, gap, opener_length, select
from tsdkd.stages.inspection.tokens import Texts, load_texts
from tsdkd.stages.reporter import Reporter, Silent


def inspect_scores(
    scores: Path,
    config: InspectConfig,
    rollouts: Path | None = None,
    checkpoint: Path | None = None,
    student: str | None = None,
    after: str | None = None,
    reporter: Reporter | None = None,
) -> Response:
    """One response as it was scored; `after`: a model that reads it, too, to compare.

    A `checkpoint` made from these scores says what was selected. `student`: whose tokenizer shows the tokens.
    Raises InputError.
    """
    reporter = reporter or Silent()
    answered, scored = open_recorded(scores, rollouts)
    objective = _objective(scored, config, checkpoint, reporter)
    texts = _texts(scored, student, reporter)
    index = _chosen(answered, scored, config, objective, reporter)
    row, view = answered[index], scored[index]
    selection = select(view.student_entropy, view.teacher_entropy, objective, _fraction(scored, index, objective))
    later = None
    if after:
        from tsdkd.stages.inspection.live import views

        dtype = scored.artifact.manifest.config["dtype"]
        (later,) = views(row, [after], scored.model("teacher").name, objective.k, dtype)
    return assemble(row, texts, objective, selection, view, later, after)


def inspect_models(
    rollouts: Path, config: InspectConfig, student: str, teacher: str, after: str | None = None
) -> Response:
    """One response of rollouts that are not scored, read by both models. Raises InputError."""
    answered, objective = Rollouts(read(rollouts, "rollouts", hashed=False)), config.objective(TSDKDConfig())
    if config.sample in {LARGEST_GAP, LONGEST_OPENER} or objective.opener == "adaptive":
        raise InputError(
            "The largest gap, the longest opener and the adaptive opener are known of scores alone.",
            "Run `tsdkd score` first, or choose a sample by its id and --opener by a share.",
        )
    row = answered[_index(answered, config)]

    from tsdkd.stages.inspection.live import views

    before, *later = views(row, [student, *([after] if after else [])], teacher, objective.k)
    fraction = fraction_chooser(objective)(before.student_entropy, before.teacher_entropy)
    selection = select(before.student_entropy, before.teacher_entropy, objective, fraction)
    return assemble(row, load_texts(student), objective, selection, before, later[0] if later else None, after)


def inspect_all(
    scores: Path, config: InspectConfig, checkpoint: Path | None = None, reporter: Reporter | None = None
) -> Aggregate:
    """What is selected in all responses of an artifact. Raises InputError."""
    reporter = reporter or Silent()
    scored = Scores(read(scores, "scores", hashed=False))
    objective = _objective(scored, config, checkpoint, reporter)
    with reporter.progress("scores read", len(scored), "responses") as advance:
        return aggregate(scored, objective, advance)


def _objective(scores: Scores, config: InspectConfig, checkpoint: Path | None, reporter: Reporter) -> TSDKDConfig:
    """As the checkpoint was trained, if it was made from these scores; else the paper's; with what is given."""
    recorded = TSDKDConfig()
    if checkpoint is not None and (checkpoint / MANIFEST).is_file():
        manifest = load_manifest(checkpoint)
        if scores.artifact.fingerprint in {parent.fingerprint for parent in manifest.parents}:
            recorded = TSDKDConfig(**manifest.config["objective"])
            reporter.say(f"What is taught is as {checkpoint} was trained, where no option says otherwise.")
        else:
            reporter.say(f"{checkpoint} was not made from these scores: what is taught is as in the paper.")
    if recorded.released:
        reporter.say(f"It was trained with the released code's {', '.join(recorded.released)}; the paper's are shown.")
    if recorded.temperature != 1:
        reporter.say(f"Entropies are those at temperature 1; training divides logits by {recorded.temperature:g}.")
    return config.objective(recorded, scores.k)


def _texts(scores: Scores, student: str | None, reporter: Reporter) -> Texts:
    """Of the `student` named here, else of the one that was recorded."""
    recorded = scores.model("student")
    texts = load_texts(student or recorded.name)
    if student and texts.fingerprint != recorded.tokenizer:
        reporter.say(f"The tokenizer of {student} is another than the recorded one: texts may be wrong.")
    return texts


def _chosen(
    rollouts: Rollouts, scores: Scores, config: InspectConfig, objective: TSDKDConfig, reporter: Reporter
) -> int:
    if config.sample == LARGEST_GAP:
        return _first_largest(scores, gap, reporter)
    if config.sample == LONGEST_OPENER:
        fraction = fraction_chooser(objective)
        return _first_largest(scores, lambda s, t: opener_length(s, fraction(s, t)), reporter)
    return _index(rollouts, config)


def _index(rollouts: Rollouts, config: InspectConfig) -> int:
    if config.sample == RANDOM:
        return Random(config.seed).randrange(len(rollouts))
    return rollouts.find(config.sample)


def _first_largest(scores: Scores, measure: Callable[[Array, Array], float], reporter: Reporter) -> int:
    """Of all responses, by what their entropies (student's, teacher's) measure."""
    best, found, seen = float("-inf"), 0, 0
    with reporter.progress("entropies read", len(scores), "responses") as advance:
        for batch in scores.stream(list(ENTROPIES)):
            rows = zip(*(batch.split(batch.columns[name]) for name in ENTROPIES), strict=True)
            for index, (student, teacher) in enumerate(rows, seen):
                value = measure(student, teacher)
                if value > best:
                    best, found = value, index
            seen += len(batch.lengths)
            advance(len(batch.lengths))
    return found


def _fraction(scores: Scores, index: int, objective: TSDKDConfig) -> float:
    """The opener's c; where it is adaptive, the responses before this one count, too."""
    choose, before = fraction_chooser(objective), WINDOW - 1 if objective.opener == "adaptive" else 0
    nearest = [scores[i] for i in range(max(0, index - before), index + 1)]
    return [choose(view.student_entropy, view.teacher_entropy) for view in nearest][-1]
