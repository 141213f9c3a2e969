"""The study: its questions, and the arms that each compares."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from recipes.experiment.arms import Arm
from recipes.experiment.entries import COMPLEMENT, GKD, MILD, NO_ENTROPY, NO_RANKING, TSDKD, Entry

SMALL, TWO_CANDIDATES = "--em-weight 0.01", "--k 2"
TERMS = {
    "direct (GKD, β 0.9)": GKD,
    "gate": Entry("tsdkd-gate", "tsdkd", "--alpha 0 --em-weight 0"),
    "gate, indirect": NO_ENTROPY,
    "gate, indirect with complement": Entry(
        "tsdkd-complement-no-entropy", "tsdkd-complement", "--method-option em_weight=0.0"
    ),
    "gate, entropy": NO_RANKING,
    "gate, indirect, entropy (TSD-KD)": TSDKD,
    "gate, indirect with complement, entropy": COMPLEMENT,
}
WEIGHTS = {
    "direct (GKD, β 0.9)": GKD,
    "1 : 0.1 : 1 (the paper's)": TSDKD,
    "1 : 0.1 : 0.1": Entry("tsdkd-em-0.1", "tsdkd", "--em-weight 0.1"),
    "1 : 0.1 : 0.01": Entry("tsdkd-em-0.01", "tsdkd", SMALL),
    "10 : 0.1 : 0.01 (mild)": MILD,
    "100 : 0.1 : 0.01": Entry("tsdkd-direct-100", "tsdkd", f"--direct-weight 100 {SMALL}"),
    "1 : 0 : 0.01": Entry("tsdkd-no-ranking-em-0.01", "tsdkd", f"--alpha 0 {SMALL}"),
    "1 : 0.1 : 0, two candidates": Entry("tsdkd-no-entropy-k-2", "tsdkd", f"{TWO_CANDIDATES} --em-weight 0"),
    "10 : 0.1 : 0.01, two candidates": Entry("tsdkd-mild-k-2", "tsdkd", f"{TWO_CANDIDATES} --direct-weight 10 {SMALL}"),
}
RELEASED = {
    "direct (GKD, β 0.9)": GKD,
    "TSD-KD": TSDKD,
    "released": Entry("tsdkd-released", "tsdkd-released"),
    "released ranking only": Entry("tsdkd-released-ranking", "tsdkd", "--released ranking"),
    "released opener only": Entry("tsdkd-released-opener", "tsdkd", "--released opener"),
    "released entropy only": Entry("tsdkd-released-entropy", "tsdkd", "--released entropy"),
}
WITHOUT_TEACHER = {
    "direct (GKD, β 0.9)": GKD,
    "GKD, responses at temperature 0.5": Entry("gkd-sampled-at-0.5", "gkd", "--beta 0.9 --sample-temperature 0.5"),
    "entropy alone": Entry("entropy-alone", "tsdkd", "--direct-weight 0 --alpha 0"),
    "TSD-KD": TSDKD,
    "TSD-KD, responses at temperature 0.5": Entry("tsdkd-sampled-at-0.5", "tsdkd", "--sample-temperature 0.5"),
}
KINDS = {"GKD": GKD, "TSD-KD": TSDKD, "TSD-KD, mild": MILD, "TSD-KD, complement": COMPLEMENT}


@dataclass(frozen=True)
class StudyArm:
    """One training setting, of which each seed makes an `Arm`."""

    name: str
    task: str
    entry: Entry
    factor: float = 1.0
    """The learning rate, as a multiple of the task's."""
    start: int | None = None
    """The accuracy of the student before training, in percent; None: the task's."""

    def of_seed(self, seed: int, rate: float) -> Arm:
        """rate: the task's learning rate."""
        return Arm(seed, "test", self.entry, self.factor * rate, self.start)


@dataclass(frozen=True)
class Question:
    title: str
    groups: list[list[StudyArm]]
    """Arms that are compared; the first arm of a group is the reference of the others."""


def _arms(entries: dict[str, Entry], task: str, prefix: str = "", **conditions: object) -> list[StudyArm]:
    return [StudyArm(f"{prefix}{name}", task, entry, **conditions) for name, entry in entries.items()]


def _authored(author: str) -> list[StudyArm]:
    entries = {name: replace(KINDS[name], name=f"{KINDS[name].name}-{author}", author=author) for name in KINDS}
    return _arms(entries, "sums", f"{author}: ", start=50)


TERMS_OF_SUMS = _arms(TERMS, "sums", start=50)
RATES = [
    Question(
        f"Which learning rate? {task}",
        [_arms(KINDS, task, f"x {factor:g}: ", factor=factor, start=start) for factor in factors],
    )
    for task, start, factors in (
        ("sums", 50, (0.25, 1.0, 4.0)),
        ("plans", None, (0.25, 1.0, 4.0)),
        ("embedded", None, (1.0, 4.0)),  # at the paper's rate, and at one that moves the student in 48 steps
    )
]
QUESTIONS = [
    Question("What does each term do? sums from 50 %", [TERMS_OF_SUMS]),
    *(Question(f"What does each term do? {task}", [_arms(TERMS, task)]) for task in ("sums", "plans", "embedded")),
    *(
        Question(f"Which weights (direct : indirect : entropy)? {task}", [_arms(WEIGHTS, task, start=start)])
        for task, start in (("sums", 50), ("plans", None))
    ),
    *RATES,
    *(
        Question(
            f"From which student? {task}", [_arms(KINDS, task, f"{start or 85} %: ", start=start) for start in starts]
        )
        for task, starts in (("sums", (25, 50, None)), ("plans", (50, None)))
    ),
    Question("How certain is the teacher?", [_arms(KINDS, task, f"{task}: ") for task in ("plans", "plans-one")]),
    Question("How long is a response?", [_arms(KINDS, task, f"{task}: ") for task in ("plans-short", "plans")]),
    Question(
        "Which author of the responses?",
        [_arms(KINDS, "sums", "student: ", start=50), _authored("half"), _authored("teacher")],
    ),
    Question("Does the gain need the teacher? embedded, x 4", [_arms(WITHOUT_TEACHER, "embedded", factor=4.0)]),
    Question("What does the released variant do?", [_arms(RELEASED, "sums", start=50)]),
]


def every_arm(methods: Collection[str] = ()) -> list[StudyArm]:
    """Every arm once, in the order of the questions; or those of the named methods, and the arms they compare with."""
    chosen: list[StudyArm] = []
    for group in (group for question in QUESTIONS for group in question.groups):
        named = [arm for arm in group if not methods or arm.entry.name in methods]
        chosen += [group[0], *named] if named else []
    return list(dict.fromkeys(replace(arm, name="") for arm in chosen))
